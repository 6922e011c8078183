"""The parts of a pipeline that engines can stand for, and whether a bundle's fit a pipeline's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdkd.bundle import Bundle
from sdkd.contract import MID_RESIDUAL, is_tiny_vae, vae_scale
from sdkd.errors import EngineError, InputError, ModelError
from sdkd.files import read_json

if TYPE_CHECKING:
    from engines.module import EngineModule


@dataclass(frozen=True)
class Part:
    """One module of a pipeline: the engines it needs, those it can use, and what must agree with the eager module."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    agree: tuple[str, ...]


PARTS: dict[str, Part] = {
    "unet": Part(("unet",), (), ("in_channels", "out_channels", "cross_attention_dim")),
    "vae": Part(("vae_decoder",), ("vae_encoder",), ("latent_channels", "scaling_factor")),
    "text_encoder": Part(("text_encoder",), (), ("hidden_size", "vocab_size", "max_position_embeddings")),
    "controlnet": Part(("controlnet",), (), ("cross_attention_dim", "conditioning_channels")),
}
BASE_PARTS = ("unet", "vae", "text_encoder")  # of every pipeline


def engine_names(bundle: Bundle, slot: str, parts: Sequence[str]) -> list[str]:
    """The components whose engines a slot has for these parts: the required ones, and the optional ones there are."""
    return [
        name
        for part in parts
        for name in (
            *PARTS[part].required,
            *(name for name in PARTS[part].optional if f"{slot}/{name}" in bundle.manifest.engines),
        )
    ]


def check_agreement(pipe: Any, bundle: Bundle, parts: Sequence[str]) -> None:
    """ModelError, naming both values, when a bundle's component does not fit where a pipeline has its own."""
    if any(getattr(pipe, name, None) is None for name in BASE_PARTS) or hasattr(pipe, "text_encoder_2"):
        raise ModelError(
            f"{type(pipe).__name__} is no Stable Diffusion 1.x/2.x pipeline: "
            "plug needs one with unet, vae and text_encoder"
        )
    for part in parts:
        config = getattr(pipe, part).config
        ours = bundle.config(PARTS[part].required[0])
        values = {key: (ours.get(key), getattr(config, key, None)) for key in PARTS[part].agree}
        if part == "vae":
            theirs = dict(config)
            values = {"pixels per latent": (vae_scale(ours), vae_scale(theirs))} | values
            if is_tiny_vae(ours) != is_tiny_vae(theirs):  # each kind scales its latents in its own way
                values.pop("scaling_factor")
        _refuse_differences(bundle, part, values)
    scheduler = bundle.path / "scheduler" / "scheduler_config.json"
    if "unet" in parts and scheduler.is_file():
        ours = read_json(scheduler)
        key = "prediction_type"
        _refuse_differences(bundle, "scheduler", {key: (ours.get(key), getattr(pipe.scheduler.config, key, None))})


def _refuse_differences(bundle: Bundle, part: str, values: Mapping[str, tuple[Any, Any]]) -> None:
    for key, (ours, theirs) in values.items():
        if ours is not None and theirs is not None and ours != theirs:
            raise ModelError(
                f"bundle {str(bundle.path)!r} does not fit this pipeline: {part} {key} is {ours} in the bundle and "
                f"{theirs} in the pipeline. Plug it into the pipeline that it was exported from, "
                "or use engines.load_pipeline"
            )


def chosen_parts(components: Sequence[str] | None, pipe: Any, bundle: Bundle) -> tuple[str, ...]:
    """What to plug; InputError for an unknown name, ModelError for a ControlNet and a UNet without its inputs."""
    for name in components or ():
        if name not in PARTS:
            raise InputError(f"component {name!r} is unknown: choose from {', '.join(PARTS)}")
    chosen = tuple(components or BASE_PARTS)
    controlnet = getattr(pipe, "controlnet", None)
    if controlnet is None:
        return chosen
    takes = {spec.name for spec in bundle.component("unet").contract.inputs} if "unet" in chosen else {MID_RESIDUAL}
    if MID_RESIDUAL not in takes:
        raise ModelError(
            f"the UNet of bundle {str(bundle.path)!r} has no inputs for this {type(pipe).__name__}'s ControlNet: "
            "export the model again with --controlnet FOLDER"
        )
    single = type(controlnet).__name__ != "MultiControlNetModel"
    ours = "controlnet" in bundle.manifest.components
    return (*chosen, "controlnet") if components is None and single and ours else chosen


def check_devices(pipe: Any, modules: Mapping[str, EngineModule]) -> None:
    """EngineError when modules that stay eager sit on another kind of device than the engines' tensors."""
    places = {name: getattr(pipe, name).device.type for name in BASE_PARTS if name not in modules}
    for name, place in places.items():
        for other, module in modules.items():
            if module.device.type != place:
                raise EngineError(
                    f"{name} stays eager on {place}, the engine of {other} works on {module.device.type}: move the "
                    f"pipeline first with pipe.to({module.device.type!r})"
                )
