"""Engines inside diffusers pipelines: plug a bundle into one, unplug it, or load one from a bundle alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from engines.adapters import LoraMethods
from sdkd.bundle import Bundle
from sdkd.contract import MID_RESIDUAL, is_tiny_vae, vae_scale
from sdkd.errors import BundleError, EngineError, InputError, MissingExtraError, ModelError, StaleEngineError
from sdkd.files import read_json
from sdkd.targets import availability, check_target, environment

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

    from engines.module import EngineModule
    from engines.session import Rebuild

Pipe = TypeVar("Pipe")
log = logging.getLogger(__name__)

ORDER = ("tensorrt", "tensorrt-rtx", "openvino", "onnxruntime")


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
# Pipelines that are loaded as such from a bundle; any other is loaded as text-to-image.
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
             "StableDiffusionInstructPix2PixPipeline")  # fmt: skip
CONTROLNET_PIPELINE = "StableDiffusionControlNetPipeline"


def plug(
    pipe: Pipe,
    bundle: Bundle | str | Path,
    target: str | None = None,
    components: Sequence[str] | None = None,
    *,
    rebuild: Rebuild | None = None,
) -> Pipe:
    """Replace a diffusers pipeline's `unet`, `vae` and `text_encoder` by engines, in place; returns the pipeline.

    `target`: a slot of the bundle (`openvino`, `tensorrt`, `openvino-bf16`, ...), or None for the best that runs here.
    `components`: some of `unet`, `vae`, `text_encoder`, `controlnet`; None for the first three, and the fourth where
    the pipeline has one ControlNet and the bundle, too. The eager modules are kept for `unplug`. `rebuild`: how engines
    that cannot be refitted get other weights, for LoRA and `swap_weights`: `sdkd.workflow.rebuild`.
    Nothing changes unless every engine opens. Raises ModelError when bundle and pipeline disagree, naming
    both values, and what `engines.session.open_session` raises.
    """
    opened = _open(bundle)
    parts = _parts(components, pipe, opened)
    check_agreement(pipe, opened, parts)
    slot = target or best_slot(opened, parts)
    pipeline: Any = pipe
    modules: dict[str, EngineModule] = {}
    try:
        for name in parts:
            eager = getattr(pipeline, name)
            modules[name] = build_module(opened, slot, name, eager.dtype, eager.device, _eager(eager))
        _check_devices(pipeline, modules)
    except BaseException:
        for module in modules.values():
            module.close()
        raise
    for name, module in modules.items():
        setattr(pipeline, name, module)
    _install(pipe, modules, rebuild)
    return pipe


def _install(pipe: Any, modules: Mapping[str, EngineModule], rebuild: Rebuild | None) -> None:
    """The pipeline's LoRA methods on engines, and how those get other weights."""
    for session in (session for module in modules.values() for session in module.sessions()):
        session.rebuild = rebuild
    LoraMethods(pipe, modules).install()


def unplug(pipe: Pipe) -> Pipe:
    """Put the eager modules back; returns the pipeline. EngineError where there are none to put back."""
    from engines.module import EngineModule

    pipeline: Any = pipe
    plugged = {name: getattr(pipeline, name, None) for name in PARTS}
    engines = {name: module for name, module in plugged.items() if isinstance(module, EngineModule)}
    if not engines or any(_eager(module) is None for module in engines.values()):
        why = "was loaded from a bundle and has no eager modules" if engines else "runs on no engine"
        raise EngineError(f"this {type(pipe).__name__} {why}: nothing to unplug")
    LoraMethods(pipe, engines).remove()
    for name, module in engines.items():
        eager: Any = _eager(module)
        if (eager.device, eager.dtype) != (module.device, module.dtype):  # the pipeline was moved while plugged
            eager.to(module.device, module.dtype)
        setattr(pipeline, name, eager)
    return pipe


def load_pipeline(
    bundle: Bundle | str | Path,
    target: str | None = None,
    *,
    torch_dtype: torch.dtype | None = None,
    controlnet: bool = True,
    rebuild: Rebuild | None = None,
) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline from a bundle's tokenizer, scheduler, configs and engines: no eager weights are read.

    `target` and `rebuild` as in `plug`. `torch_dtype` (float32) is what latents and schedulers compute in; engines keep
    their own precision. With a ControlNet in the bundle the pipeline is StableDiffusionControlNetPipeline, unless
    `controlnet` is False: then its UNet runs without residuals. Raises EngineError when no engine of the bundle runs
    here, and says why of each.
    """
    import torch

    opened = _open(bundle)
    slot = target or best_slot(opened)
    index = read_json(opened.path / "model_index.json")
    controlled = controlnet and f"{slot}/controlnet" in opened.manifest.engines
    pipeline_class = _pipeline_class(index, controlled)
    others = {"tokenizer": _tokenizer(opened), "scheduler": _scheduler(opened, index)}
    dtype, device = torch_dtype or torch.float32, torch.device("cpu")
    names = (*BASE_PARTS, "controlnet") if controlled else BASE_PARTS
    modules = {name: build_module(opened, slot, name, dtype, device) for name in names}
    pipe: StableDiffusionPipeline = pipeline_class(
        **modules, **others, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    _install(pipe, modules, rebuild)
    return pipe


def build_module(
    bundle: Bundle,
    slot: str,
    part: str,
    dtype: torch.dtype,
    device: torch.device,
    original: torch.nn.Module | None = None,
) -> EngineModule:
    """Open the engines of one part of a pipeline and wrap them; on a GPU target the module lives on that GPU."""
    from engines.modules import EngineControlNet, EngineTextEncoder, EngineUNet, EngineVAE
    from engines.session import EngineSession, open_session

    wanted = [
        *PARTS[part].required,
        *(name for name in PARTS[part].optional if f"{slot}/{name}" in bundle.manifest.engines),
    ]
    sessions: dict[str, EngineSession] = {}
    try:
        for name in wanted:
            sessions[name] = open_session(bundle, slot, name)
    except BaseException:
        for session in sessions.values():
            session.close()
        raise
    first = sessions[wanted[0]]
    place = first.device if first.device.type != "cpu" else device
    common = (bundle.config(wanted[0]), dtype, place, original)
    if part == "vae":
        return EngineVAE(first, sessions.get("vae_encoder"), *common)
    kinds = {"unet": EngineUNet, "text_encoder": EngineTextEncoder, "controlnet": EngineControlNet}
    module: EngineModule = kinds[part](first, *common)
    return module


def best_slot(bundle: Bundle, parts: Sequence[str] = BASE_PARTS) -> str:
    """The fastest slot whose engines are complete, fresh and run here; EngineError lists why each one is not."""
    slots = sorted(
        bundle.slots(), key=lambda slot: (ORDER.index(check_target(slot).name), slot != check_target(slot).name)
    )
    refused: dict[str, str] = {}
    for slot in slots:
        reason = why_not(bundle, slot, parts)
        if reason is None:
            for other, text in refused.items():
                log.warning("engine %s was passed over for %s: %s", other, slot, text)
            return slot
        refused[slot] = reason
    found = "; ".join(f"{slot}: {reason}" for slot, reason in refused.items()) or "it has none"
    runnable = next((name for name in ORDER if (here := availability(name)).can_run and here.can_build), "onnxruntime")
    raise EngineError(
        f"no engine of {str(bundle.path)!r} runs here ({found}). Build one with: "
        f"sdkd build-engine {bundle.path} --target {runnable}"
    )


def why_not(bundle: Bundle, slot: str, parts: Sequence[str]) -> str | None:
    """Why a slot's engines cannot run here, in words with the repair, or None when they can. Files are not read."""
    here = availability(check_target(slot).name)
    if not here.can_run:
        return f"{here.reason} ({here.fix})"
    try:
        for name in (name for part in parts for name in PARTS[part].required):
            record = bundle.engine(slot, name)
            bundle.check_fresh(record, environment(record.target))
    except (BundleError, StaleEngineError, MissingExtraError) as error:
        return str(error)
    return None


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


def _open(bundle: Bundle | str | Path) -> Bundle:
    return bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)


def _parts(components: Sequence[str] | None, pipe: Any, bundle: Bundle) -> tuple[str, ...]:
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


def _eager(module: Any) -> torch.nn.Module | None:
    """The eager module behind an engine module, or the module itself."""
    from engines.module import EngineModule

    original: torch.nn.Module | None = module.__dict__["original"] if isinstance(module, EngineModule) else module
    return original


def _check_devices(pipe: Any, modules: Mapping[str, EngineModule]) -> None:
    """EngineError when modules that stay eager sit on another kind of device than the engines' tensors."""
    places = {name: getattr(pipe, name).device.type for name in BASE_PARTS if name not in modules}
    for name, place in places.items():
        for other, module in modules.items():
            if module.device.type != place:
                raise EngineError(
                    f"{name} stays eager on {place}, the engine of {other} works on {module.device.type}: move the "
                    f"pipeline first with pipe.to({module.device.type!r})"
                )


def _pipeline_class(index: Mapping[str, Any], controlled: bool) -> Callable[..., Any]:
    import diffusers

    name = index.get("_class_name")
    plain = name if name in PIPELINES else PIPELINES[0]
    found: Callable[..., Any] = getattr(diffusers, CONTROLNET_PIPELINE if controlled else plain)
    return found


def _tokenizer(bundle: Bundle) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(bundle.path / "tokenizer")


def _scheduler(bundle: Bundle, index: Mapping[str, Any]) -> Any:
    import diffusers

    name = (index.get("scheduler") or [None, None])[1]
    if not isinstance(name, str) or not hasattr(diffusers, name):
        raise BundleError(f"bundle {str(bundle.path)!r} names an unknown scheduler {name!r}: export the model again")
    return getattr(diffusers, name).from_pretrained(bundle.path / "scheduler")
