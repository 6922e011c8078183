"""Full-size Stable Diffusion pipelines with random weights: for measuring builds and latency without a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdkd.errors import InputError
from sdkd.students import StudentSpec, full_config, student_config, student_spec

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

PREFIX = "random:"
_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


@dataclass(frozen=True)
class Family:
    """Configs of one published family: what differs from the libraries' defaults."""

    unet: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    image_size: int  # pixels
    prediction_type: str


FAMILIES: dict[str, Family] = {
    "sd15": Family(
        {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
        {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "projection_dim": 768, "hidden_act": "quick_gelu",
        },
        512,
        "epsilon",
    ),
    "sd21": Family(
        {
            "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "sample_size": 96,
            "use_linear_projection": True, "upcast_attention": True,
        },
        {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
            "projection_dim": 512, "hidden_act": "gelu",
        },
        768,
        "v_prediction",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class RandomModel:
    """A parsed name such as `random:sd15` or `random:sd21-bk-small`."""

    family: str
    student: StudentSpec | None

    @property
    def unet_config(self) -> dict[str, Any]:
        """The UNet's config: the family's, or its student's."""
        config = full_config(FAMILIES[self.family].unet)
        return student_config(config, self.student) if self.student else config

    @property
    def seed(self) -> int:
        """Fixed by the family, so that every student of it has the same text encoder and VAE."""
        return int.from_bytes(hashlib.sha256(self.family.encode()).digest()[:4], "big")


def parse(name: str) -> RandomModel:
    """Read `random:sd15`, `random:sd15-tiny`, `random:sd21-bk-small`; InputError lists the forms."""
    family, _, student = name.removeprefix(PREFIX).partition("-")
    if family not in FAMILIES:
        raise InputError(
            f"model {name!r} names no known family: give {PREFIX}FAMILY or {PREFIX}FAMILY-STUDENT "
            f"with FAMILY one of {', '.join(FAMILIES)} and STUDENT e.g. small or tiny"
        )
    return RandomModel(family, student_spec(student) if student else None)


def random_pipeline(model: RandomModel, tokenizer: CLIPTokenizer, dtype: torch.dtype) -> StableDiffusionPipeline:
    """The whole pipeline in `dtype`, without a hub; its weights depend on the name alone, up to rounding to `dtype`."""
    return _pipeline(model, tokenizer, {part: random_part(model, part, tokenizer, dtype) for part in _CLASSES})


def random_part(model: RandomModel, part: str, tokenizer: CLIPTokenizer, dtype: torch.dtype) -> Any:
    """The `unet`, `vae` or `text_encoder` of `random_pipeline` alone, with the same weights."""
    import importlib

    family = FAMILIES[model.family]
    tokens = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    config, seed = {
        "vae": (_VAE | {"sample_size": family.image_size}, model.seed),
        "text_encoder": ({**family.text_encoder, **tokens}, model.seed + 1),
        "unet": (model.unet_config, model.seed + 2),
    }[part]
    if part == "text_encoder":
        from transformers import CLIPTextConfig

        config = {"config": CLIPTextConfig(**config)}
    library, name = _CLASSES[part]
    return _random(getattr(importlib.import_module(library), name), config, seed, dtype)


def random_rest(model: RandomModel, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """The pipeline without its heavy parts, whose places still name their classes."""
    pipe = _pipeline(model, tokenizer, dict.fromkeys(_CLASSES))
    pipe.register_to_config(**_CLASSES)
    return pipe


_CLASSES = {
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "unet": ("diffusers", "UNet2DConditionModel"),
}


def _pipeline(model: RandomModel, tokenizer: CLIPTokenizer, parts: Mapping[str, Any]) -> StableDiffusionPipeline:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    kind = FAMILIES[model.family].prediction_type
    return StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(**_NOISE, clip_sample=False, set_alpha_to_one=False, prediction_type=kind),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _random(kind: Any, config: Mapping[str, Any], seed: int, dtype: torch.dtype) -> Any:
    """A module whose parameters are made once, in `dtype`: uniform with variance 1 / fan-in, norms 1, biases 0."""
    import numpy as np
    import torch
    from accelerate import init_empty_weights

    with init_empty_weights():  # parameters on the meta device, buffers for real
        module = kind(**config)
    generator = np.random.Generator(np.random.SFC64(seed))  # several times faster than torch's on a CPU
    weights = {}
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            bound = (3 / parameter[0].numel()) ** 0.5
            numbers = generator.random(parameter.numel(), dtype=np.float32)
            value = torch.from_numpy(numbers).mul_(2 * bound).sub_(bound).view(parameter.shape)
        else:
            value = torch.full(parameter.shape, 1.0 if name.endswith("weight") else 0.0)
        weights[name] = value.to(dtype)
    module.load_state_dict(weights, strict=False, assign=True)
    return module
