"""Engines inside diffusers pipelines: plug a bundle into one, unplug it, or load one from a bundle alone."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from engines.adapters import LoraMethods
from engines.parts import BASE_PARTS, PARTS, check_agreement, check_devices, chosen_parts, engine_names
from engines.slots import best_slot
from sdkd.bundle import Bundle
from sdkd.errors import BundleError, EngineError
from sdkd.files import read_json
from sdkd.targets import check_target

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

    from engines.module import EngineModule
    from engines.session import Rebuild, Session

    Opener = Callable[[str], Session]

Pipe = TypeVar("Pipe")

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
    keep_eager: bool = False,
    eager_fallback: bool = False,
    low_memory: bool = False,
) -> Pipe:
    """Replace a diffusers pipeline's `unet`, `vae` and `text_encoder` by engines, in place; returns the pipeline.

    `target`: a slot of the bundle (`openvino`, `tensorrt`, `openvino-bf16`, ...), or None for the best that runs here.
    `components`: some of `unet`, `vae`, `text_encoder`, `controlnet`; None for the first three, and the fourth where
    the pipeline has one ControlNet and the bundle, too. `rebuild`: how engines that cannot be refitted get other
    weights, for LoRA and `swap_weights`: `sdkd.workflow.rebuild`. The eager modules are let go, and their memory with
    them, unless `keep_eager` (for `unplug`) or `eager_fallback`: then what the engines were not built for runs eagerly,
    which is announced once per shape. `low_memory` opens engines in turn: see `engines.turns`.
    Nothing changes unless every engine opens. Raises ModelError when bundle and pipeline disagree, naming both values,
    EngineError when memory is short, and what `engines.session.open_session` raises.
    """
    opened = _open(bundle)
    parts = chosen_parts(components, pipe, opened)
    check_agreement(pipe, opened, parts)
    slot = target or best_slot(opened, parts)
    open_one = _opener(opened, slot, parts, low_memory)
    pipeline: Any = pipe

    def stand_in(name: str) -> EngineModule:
        eager = getattr(pipeline, name)
        kept = _eager(eager) if keep_eager or eager_fallback else None
        return build_module(opened, slot, name, eager.dtype, eager.device, kept, open_one)

    with _all_or_none() as modules:
        for name in parts:
            modules[name] = stand_in(name)
            modules[name].falls_back = eager_fallback
        check_devices(pipeline, modules)
    for name, module in modules.items():
        setattr(pipeline, name, module)
    _install(pipe, modules, rebuild)
    return pipe


@contextlib.contextmanager
def _all_or_none() -> Iterator[dict[str, EngineModule]]:
    """Modules by name, to be filled; those that are there are closed when the next one cannot be opened."""
    modules: dict[str, EngineModule] = {}
    try:
        yield modules
    except BaseException:
        for module in modules.values():
            module.close()
        raise


def _opener(bundle: Bundle, slot: str, parts: Sequence[str], low_memory: bool) -> Opener:
    """How the engines of these parts are opened: at once, or in turn; after a look at the memory that is free."""
    from engines.memory import check_memory
    from engines.session import expected_device, open_session
    from engines.turns import Turns

    place = expected_device(check_target(slot).name).type
    check_memory(bundle, slot, engine_names(bundle, slot, parts), place, low_memory)
    return Turns(bundle, slot).session if low_memory else functools.partial(open_session, bundle, slot)


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
        why = (
            "has no eager modules, since it was loaded from a bundle or plugged without keep_eager=True"
            if engines
            else "runs on no engine"
        )
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
    low_memory: bool = False,
) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline from a bundle's tokenizer, scheduler, configs and engines: no eager weights are read.

    `target`, `rebuild` and `low_memory` as in `plug`. `torch_dtype` (float32) is what latents and schedulers compute
    in; engines keep their own precision. With a ControlNet in the bundle the pipeline is
    StableDiffusionControlNetPipeline, unless `controlnet` is False: then its UNet runs without residuals. Raises
    EngineError when memory is short, and when no engine of the bundle runs
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
    open_one = _opener(opened, slot, names, low_memory)
    with _all_or_none() as modules:
        for name in names:
            modules[name] = build_module(opened, slot, name, dtype, device, None, open_one)
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
    open_one: Opener | None = None,
) -> EngineModule:
    """Open the engines of one part of a pipeline and wrap them; on a GPU target the module lives on that GPU.

    `open_one`: gives a component's session, `open_session` by default.
    """
    from engines.modules import EngineControlNet, EngineTextEncoder, EngineUNet
    from engines.session import open_session
    from engines.vae import EngineVAE

    wanted = engine_names(bundle, slot, (part,))
    open_one = open_one or functools.partial(open_session, bundle, slot)
    sessions: dict[str, Session] = {}
    try:
        for name in wanted:
            sessions[name] = open_one(name)
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


def _open(bundle: Bundle | str | Path) -> Bundle:
    return bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)


def _eager(module: Any) -> torch.nn.Module | None:
    """The eager module behind an engine module, or the module itself."""
    from engines.module import EngineModule

    original: torch.nn.Module | None = module.__dict__["original"] if isinstance(module, EngineModule) else module
    return original


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
