"""Full-size Stable Diffusion pipelines with random weights: for measuring builds and latency without a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdkd.errors import InputError
from sdkd.models.families import CLASSES, FAMILIES, HEAVY, empty
from sdkd.students.blocks import StudentSpec, full_config, student_config, student_spec

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

PREFIX = "random:"
_SEEDS = {"vae": 0, "text_encoder": 1, "unet": 2}


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
    return _pipeline(model, tokenizer, {part: random_part(model, part, tokenizer, dtype) for part in HEAVY})


def random_part(model: RandomModel, part: str, tokenizer: CLIPTokenizer, dtype: torch.dtype) -> Any:
    """The `unet`, `vae` or `text_encoder` of `random_pipeline` alone, with the same weights."""
    family = FAMILIES[model.family]
    config = model.unet_config if part == "unet" else family.config(part, tokenizer)
    return _random(empty(part, config), model.seed + _SEEDS[part], dtype)


def random_rest(model: RandomModel, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """The pipeline without its heavy parts, whose places still name their classes."""
    pipe = _pipeline(model, tokenizer, dict.fromkeys(HEAVY))
    pipe.register_to_config(**{part: (CLASSES[part][0], CLASSES[part][1][0]) for part in HEAVY})
    return pipe


def _pipeline(model: RandomModel, tokenizer: CLIPTokenizer, parts: Mapping[str, Any]) -> StableDiffusionPipeline:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=FAMILIES[model.family].make_scheduler(kind="DDIMScheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _random(module: Any, seed: int, dtype: torch.dtype) -> Any:
    """Give a module on the meta device parameters in `dtype`: uniform with variance 1 / fan-in, norms 1, biases 0."""
    import numpy as np
    import torch

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
