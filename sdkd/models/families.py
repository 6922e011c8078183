"""The published Stable Diffusion families as data, and their modules without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sdkd.errors import ModelError, an
from sdkd.models.clip_tokenizer import END, PADDING, TOKENS, clip_tokenizer
from sdkd.students.blocks import no_init

HEAVY = ("unet", "vae", "text_encoder")  # the parts with weights
# Classes that a pipeline's heavy parts may have, the usual one first, and the library of each part.
CLASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "unet": ("diffusers", ("UNet2DConditionModel",)),
    "vae": ("diffusers", ("AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL")),
    "text_encoder": ("transformers", ("CLIPTextModel", "CLIPTextModelWithProjection")),
}
# Of these, and of ControlNets, what an exported graph stands for. AsymmetricAutoencoderKL decodes with the masked
# image, too, which diffusers gives to no other class, and a graph has no such input.
EXPORTED: dict[str, tuple[str, ...]] = {
    **{part: kinds for part, (_, kinds) in CLASSES.items()},
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "controlnet": ("ControlNetModel",),
}
# Pipelines by the number of channels that their UNet takes.
PIPELINE_OF_CHANNELS = {
    4: "StableDiffusionPipeline",
    8: "StableDiffusionInstructPix2PixPipeline",
    9: "StableDiffusionInpaintPipeline",
}
_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_NOISE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
    "set_alpha_to_one": False,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Configs of one published family: what differs from the libraries' defaults."""

    unet: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    image_size: int  # pixels
    prediction_type: str
    pad_token: str = END
    scheduler: str = "DDIMScheduler"
    vae: Mapping[str, Any] = field(default_factory=lambda: _VAE)

    def config(self, part: str) -> dict[str, Any]:
        """The config of `unet`, `vae` or `text_encoder`; empty for another part."""
        if part == "text_encoder":
            return {**self.text_encoder, **TOKENS, "pad_token_id": PADDING[self.pad_token]}
        return {"unet": dict(self.unet), "vae": {**self.vae, "sample_size": self.image_size}}.get(part, {})

    def rest(self, channels: int = 4, prediction_type: str | None = None, scheduler: str | None = None) -> Any:
        """A pipeline without its heavy parts, whose places still name their classes, with the embedded tokenizer.

        `channels` of the UNet's input; `prediction_type` and `scheduler` where they are not the family's own.
        """
        import diffusers

        name = scheduler or self.scheduler
        own = {"skip_prk_steps": True} if name == "PNDMScheduler" else {"clip_sample": False}
        noise = _NOISE | own | {"prediction_type": prediction_type or self.prediction_type}
        pipe = getattr(diffusers, PIPELINE_OF_CHANNELS[channels])(
            **dict.fromkeys((*HEAVY, "safety_checker", "feature_extractor")),
            tokenizer=clip_tokenizer(self.pad_token),
            scheduler=getattr(diffusers, name)(**noise),
            requires_safety_checker=False,
        )
        pipe.register_to_config(**{part: (library, kinds[0]) for part, (library, kinds) in CLASSES.items()})
        return pipe


_CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768, "hidden_act": "quick_gelu",
}  # fmt: skip
_OPEN_CLIP_H = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "projection_dim": 512, "hidden_act": "gelu",
}  # fmt: skip
_UNET_2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
FAMILIES: dict[str, Family] = {
    "sd15": Family(
        {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
        _CLIP_L, 512, "epsilon", scheduler="PNDMScheduler",
    ),
    "sd21": Family(_UNET_2 | {"sample_size": 96, "upcast_attention": True}, _OPEN_CLIP_H, 768, "v_prediction", "!"),
    "sd21base": Family(_UNET_2 | {"sample_size": 64}, _OPEN_CLIP_H, 512, "epsilon", "!", "PNDMScheduler"),
}  # fmt: skip


def empty(part: str, config: Mapping[str, Any], kind: str | None = None) -> Any:
    """The module of a part, or a ControlNet, on the meta device, with its buffers for real; `kind` names another class
    than the usual.
    """
    import importlib

    from accelerate import init_empty_weights

    library, kinds = CLASSES.get(part) or ("diffusers", EXPORTED[part])
    cls = getattr(importlib.import_module(library), kind or kinds[0])
    with init_empty_weights(), no_init():
        if library == "transformers":
            return cls(cls.config_class.from_dict(dict(config)))
        return cls.from_config(dict(config))


def check_exported(part: str, kind: type | str, where: str) -> None:
    """ModelError unless an engine can stand for a part of this class; `where` it was found."""
    names = [kind] if isinstance(kind, str) else [base.__name__ for base in kind.__mro__]
    if not set(names) & set(EXPORTED[part]):
        raise ModelError(
            f"the {part} of {where} is {an(names[0])}, which is not exported: "
            f"sdkd exports {' or '.join(EXPORTED[part])}"
        )
