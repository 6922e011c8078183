"""Modules and pipelines of a family without weights, and which of their classes an engine can stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdkd.errors import ModelError, an
from sdkd.families import Family, PublishedModel
from sdkd.families.family import CLIP, PADDING, PROJECTED, TOKENS
from sdkd.models.clip_tokenizer import clip_tokenizer
from sdkd.students.blocks import no_init

# Classes that a pipeline's heavy parts may have, the usual one first, and the library of each part. Of the text
# encoders a family says which.
CLASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "unet": ("diffusers", ("UNet2DConditionModel",)),
    "vae": ("diffusers", ("AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL")),
    "text_encoder": ("transformers", (CLIP, PROJECTED)),
    "text_encoder_2": ("transformers", (PROJECTED,)),
}
# Of these, and of ControlNets, what an exported graph stands for. AsymmetricAutoencoderKL decodes with the masked
# image, too, which diffusers gives to no other class, and a graph has no such input.
EXPORTED: dict[str, tuple[str, ...]] = {
    **{part: kinds for part, (_, kinds) in CLASSES.items()},
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "controlnet": ("ControlNetModel",),
}
_SCHEDULERS: dict[str, dict[str, Any]] = {
    "PNDMScheduler": {"skip_prk_steps": True},
    "EulerDiscreteScheduler": {"timestep_spacing": "leading"},
}


def part_config(family: Family, model: PublishedModel, part: str) -> dict[str, Any]:
    """The config of a part of a published model; empty for what is no part with weights."""
    for encoder, config, pad in zip(family.text_encoders, model.text_encoders, model.pad_tokens, strict=True):
        if encoder.part == part:
            return {**config, **TOKENS, "pad_token_id": PADDING[pad]}
    return {"unet": dict(model.unet), "vae": {**model.vae, "sample_size": model.image_size}}.get(part, {})


def pipeline_rest(
    family: Family,
    model: PublishedModel,
    channels: int = 4,
    prediction_type: str | None = None,
    scheduler: str | None = None,
) -> Any:
    """A pipeline without its heavy parts, whose places still name their classes, with the embedded tokenizers.

    `channels` of the UNet's input; `prediction_type` and `scheduler` where they are not the model's own.
    """
    import diffusers

    name = scheduler or model.scheduler
    own = _SCHEDULERS.get(name, {"clip_sample": False})
    noise = {**family.noise, **own, "prediction_type": prediction_type or model.prediction_type}
    tokenizers = zip(family.tokenizers, map(clip_tokenizer, model.pad_tokens), strict=True)
    pipe = getattr(diffusers, family.by_channels[channels])(
        **dict.fromkeys((*family.parts, *family.absent)),
        **dict(tokenizers),
        scheduler=getattr(diffusers, name)(**noise),
        **family.options,
    )
    pipe.register_to_config(**{part: (CLASSES[part][0], part_classes(family, part)[0]) for part in family.parts})
    return pipe


def part_classes(family: Family, part: str) -> tuple[str, ...]:
    """The classes that a part may have in a family, the usual one first."""
    return next((encoder.kinds for encoder in family.text_encoders if encoder.part == part), CLASSES[part][1])


def remade(pipe: Any, **parts: Any) -> Any:
    """A pipeline of the same class and configuration with other parts; a pipeline looks at its parts once, here.

    It comes from the same place: no output may replace the folder that a pipeline is from.
    """
    made = new_pipeline(type(pipe), pipe.components | parts, pipe.config)
    if pipe.name_or_path:
        made.register_to_config(_name_or_path=pipe.name_or_path)
    return made


def new_pipeline(kind: Any, parts: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """A pipeline of a diffusers class: of these parts, and of a config (model_index.json) what else it takes."""
    import inspect

    taken = inspect.signature(kind.__init__).parameters
    options = {name: value for name, value in config.items() if name in taken and name not in parts}
    return kind(**options, **{name: part for name, part in parts.items() if name in taken})


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
