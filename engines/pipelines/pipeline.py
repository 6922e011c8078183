"""Engines inside diffusers pipelines: plug a bundle into one, unplug it, or load one from a bundle alone."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import diffusers
import torch
from transformers import CLIPTokenizer

from engines.lora.methods import carry_over, check_adapters, extend_lora
from engines.modules.base import EngineModule
from engines.modules.carried import (
    CheckWeights,
    check_attention,
    check_how,
    check_tokens,
    check_weights_of,
    of_graph,
    of_module,
)
from engines.modules.components import EngineControlNet, EngineTextEncoder, EngineUNet
from engines.modules.vae import EngineVAE
from engines.pipelines.parts import PARTS, best_slot, check_agreement, check_caching, chosen_parts, engine_names
from engines.pipelines.weights import guard_saving
from engines.sessions.base import Rebuild, Session
from engines.sessions.low_memory import StagedEngines, check_memory
from engines.sessions.opening import as_bundle, expected_device, on_gpu, open_session
from sdkd.bundle.manifest import Bundle
from sdkd.core.components import CACHED_UNET
from sdkd.errors import BundleError, EngineError
from sdkd.models.exportable import check_layers, check_patches
from sdkd.models.families import check_exported, new_pipeline
from sdkd.targets.registry import check_target

Opener = Callable[[str], Session]
Pipe = TypeVar("Pipe")
log = logging.getLogger(__name__)


def plug(
    pipe: Pipe,
    bundle: Bundle | str | Path,
    target: str | None = None,
    components: Sequence[str] | str | None = None,
    *,
    rebuild: Rebuild | None = None,
    keep_eager: bool = False,
    eager_fallback: bool = False,
    low_memory: bool = False,
    cache_interval: int = 1,
    check_weights: CheckWeights = "sample",
) -> Pipe:
    """Replace a diffusers pipeline's `unet`, `vae` and text encoders by engines, in place; returns the pipeline.

    `target`: a slot of the bundle (`openvino`, `tensorrt`, `openvino-bf16`, ...), or None for the best that runs here.
    `components`: some of `unet`, `vae`, `text_encoder`, `text_encoder_2`, `controlnet`; None for those of its family
    that the pipeline has, and `controlnet` where it has one ControlNet and the bundle, too. `rebuild`: how engines
    that cannot be refitted get other weights, for LoRA and `swap_weights`: `sdkd.workflow.rebuild`. The eager modules
    are let go, and their memory with them, unless `keep_eager` (for `unplug`) or `eager_fallback`: then what the
    engines were not built for runs eagerly, which is announced once per shape. `low_memory` opens engines in turn
    (`engines.sessions`).
    `cache_interval`: of so many UNet calls of an image one is whole, the others reuse what it computed
    (`sdkd.models.step_caching`); 1: all are.
    `check_weights`: whether the pipeline's weights are the bundle's is looked at in numbers of each (`sample`), in all
    numbers (`all`), or not (`none`). What an engine in the same place had stays: weights that were swapped in, kept
    eager modules, `eager_fallback`, `rebuild`, a VAE's slicing and tiling; and adapters of either, as they are.
    Nothing changes unless every engine opens. Raises ModelError when bundle and pipeline disagree, naming both values,
    and for what an eager module carries besides (`engines.modules.carried`), EngineError when memory is short or an
    eager module to keep is gone, and what `engines.open_session` raises.
    """
    check_how(check_weights)
    opened, pipeline = as_bundle(bundle), cast(Any, pipe)
    parts = chosen_parts(components, pipe, opened)
    cached = check_caching(opened, parts, cache_interval)
    slot = target or best_slot(opened, parts, cached=cached)
    _check_carried(pipeline, opened, slot, parts, check_weights)
    if keep_eager or eager_fallback:
        _check_kept(pipeline, parts)
    with on_gpu(getattr(pipeline, parts[0]).device):
        open_one = _opener(opened, slot, engine_names(opened, slot, parts, cached=cached), low_memory)
        modules: dict[str, EngineModule] = {}
        with contextlib.ExitStack() as on_failure:
            for name in parts:
                before = getattr(pipeline, name)
                kept = _eager(before) if keep_eager or eager_fallback or isinstance(before, EngineModule) else None
                module = build_module(
                    opened, slot, name, before.dtype, before.device, kept, open_one, cache_interval=cache_interval
                )
                on_failure.callback(module.close)
                module.follow(before, rebuild, eager_fallback)
                carry_over(name, before, module)
                modules[name] = module
            _check_devices(pipeline, modules)
            on_failure.pop_all()
    for name, module in modules.items():
        setattr(pipeline, name, module)
    guard_saving()
    extend_lora()
    return pipe


def _check_carried(pipe: Any, bundle: Bundle, slot: str, parts: Sequence[str], how: CheckWeights) -> None:
    """ModelError when a part of the pipeline computes what the bundle's engine would not."""
    for encoder in bundle.family.text_encoders:
        if encoder.part in parts:
            check_tokens(getattr(pipe, encoder.tokenizer, None), bundle, encoder.part)
    kept = {part: _eager(getattr(pipe, part)) for part in parts}
    for part, eager in kept.items():
        if eager is not None:
            check_exported(part, type(eager), f"this {type(pipe).__name__}")
            check_adapters(part, getattr(pipe, part))
            check_patches(part, eager)
            check_attention(part, eager)
            check_layers(part, eager)
    check_agreement(pipe, bundle, parts)
    unknown = []
    for part, eager in kept.items() if how != "none" else ():
        for component in engine_names(bundle, slot, (part,)):
            engine = getattr(pipe, part)
            given = of_graph(engine.session.checked.bundle, component) if eager is None else of_module(eager)
            if not check_weights_of(part, given, bundle, component, how):
                unknown.append(component)
    if unknown:
        log.warning("weights were not compared: bundle %s does not hold %s by name", bundle.path, ", ".join(unknown))


def _check_devices(pipe: Any, modules: Mapping[str, EngineModule]) -> None:
    """EngineError when modules that stay eager sit on another device than the engines' tensors."""
    eager = {name: getattr(pipe, name, None) for name in PARTS if name not in modules}
    for name, place in ((name, module.device) for name, module in eager.items() if module is not None):
        for other, module in modules.items():
            if module.device != place:
                raise EngineError(
                    f"{name} stays eager on {place}, the engine of {other} works on {module.device}: move the "
                    f"pipeline first with pipe.to({str(module.device)!r})"
                )


def _check_kept(pipe: Any, parts: Sequence[str]) -> None:
    for name in parts:
        if _eager(getattr(pipe, name)) is None:
            raise EngineError(
                f"the {name} of this {type(pipe).__name__} runs on an engine already, and its eager module was not "
                "kept: leave out keep_eager and eager_fallback, or plug a new eager pipeline"
            )


def _opener(bundle: Bundle, slot: str, names: Sequence[str], low_memory: bool) -> Opener:
    """How these components' engines are opened: at once, or in turn; after a look at the memory that is free."""
    place = expected_device(check_target(slot).name).type
    check_memory(bundle, slot, names, place, low_memory)
    return StagedEngines(bundle, slot).session if low_memory else functools.partial(open_session, bundle, slot)


def unplug(pipe: Pipe) -> Pipe:
    """Put the eager modules back; returns the pipeline. EngineError where there are none to put back.

    They come back as the pipeline is now: on its device, in its dtype, with a VAE's slicing and tiling, with its
    adapters, and with the weights that were swapped in, which are written into them.
    """
    pipeline: Any = pipe
    plugged = {name: getattr(pipeline, name, None) for name in PARTS}
    engines = {name: module for name, module in plugged.items() if isinstance(module, EngineModule)}
    if gone := [name for name, module in engines.items() if _eager(module) is None]:
        raise EngineError(
            f"this {type(pipe).__name__} has no eager modules, since it was loaded from a bundle or plugged without "
            f"keep_eager=True ({', '.join(gone)}): nothing to unplug"
        )
    if not engines:
        raise EngineError(f"this {type(pipe).__name__} runs on no engine: nothing to unplug")
    for name, module in engines.items():
        setattr(pipeline, name, module.restore())
    return pipe


def load_pipeline(
    bundle: Bundle | str | Path,
    target: str | None = None,
    *,
    torch_dtype: torch.dtype | None = None,
    controlnet: bool = True,
    rebuild: Rebuild | None = None,
    low_memory: bool = False,
    cache_interval: int = 1,
) -> diffusers.StableDiffusionPipeline:
    """A pipeline from a bundle's tokenizers, scheduler, configs and engines: no eager weights are read.

    `target`, `rebuild`, `low_memory` and `cache_interval` as in `plug`. `torch_dtype` (float32) is what latents and
    schedulers compute in; engines keep their own precision. With a ControlNet in the bundle the pipeline is its
    family's with one, unless `controlnet` is False: then its UNet runs without residuals. Raises
    EngineError when memory is short, and when no engine of the bundle runs here, and says why of each.
    """
    opened = as_bundle(bundle)
    family = opened.family
    cached = check_caching(opened, family.parts, cache_interval)
    slot = target or best_slot(opened, cached=cached)
    index = opened.json("model_index.json")
    controlled = controlnet and f"{slot}/controlnet" in opened.manifest.engines
    kind = str(index.get("_class_name")) if index.get("_class_name") in family.pipelines else family.by_channels[4]
    pipeline_class = getattr(diffusers, family.controlnet if controlled else kind)
    others: dict[str, Any] = {name: bundle_tokenizer(opened, name) for name in family.tokenizers}
    others["scheduler"] = bundle_scheduler(opened)
    dtype, device = torch_dtype or torch.float32, torch.device("cpu")
    names = (*family.parts, "controlnet") if controlled else family.parts
    open_one = _opener(opened, slot, engine_names(opened, slot, names, cached=cached), low_memory)
    modules: dict[str, EngineModule] = {}
    with contextlib.ExitStack() as on_failure:
        for name in names:
            modules[name] = build_module(
                opened, slot, name, dtype, device, None, open_one, cache_interval=cache_interval
            )
            on_failure.callback(modules[name].close)
        pipe: diffusers.StableDiffusionPipeline = new_pipeline(
            pipeline_class, {**modules, **others, **dict.fromkeys(family.absent)}, index | dict(family.options)
        )
        on_failure.pop_all()
    for module in modules.values():
        module.follow(None, rebuild)
    guard_saving()
    extend_lora()
    return pipe


def build_module(
    bundle: Bundle,
    slot: str,
    part: str,
    dtype: torch.dtype,
    device: torch.device,
    original: torch.nn.Module | None = None,
    open_one: Opener | None = None,
    *,
    cache_interval: int = 1,
) -> EngineModule:
    """Open the engines of one part of a pipeline and wrap them; on a GPU target the module lives on that GPU.

    `open_one`: gives a component's session, `open_session` by default.
    """
    wanted = engine_names(bundle, slot, (part,), cached=cache_interval > 1)
    open_one = open_one or functools.partial(open_session, bundle, slot)
    with contextlib.ExitStack() as on_failure:
        sessions = {name: on_failure.enter_context(open_one(name)) for name in wanted}
        on_failure.pop_all()
    first = sessions[wanted[0]]
    place = first.device if first.device.type != "cpu" else device
    common = (bundle.config(wanted[0]), dtype, place, original)
    if part == "vae":
        return EngineVAE(first, sessions.get("vae_encoder"), *common)
    if part == "unet":
        return EngineUNet(first, *common, last_layer=sessions.get(CACHED_UNET), cache_interval=cache_interval)
    return EngineControlNet(first, *common) if part == "controlnet" else EngineTextEncoder(first, *common)


def _eager(module: Any) -> Any:
    """The eager module behind an engine module, or the module itself."""
    original = module.original if isinstance(module, EngineModule) else module
    return getattr(original, "_orig_mod", original)  # of torch.compile


def bundle_tokenizer(bundle: Bundle, name: str) -> CLIPTokenizer:
    """A tokenizer that a bundle was exported with; BundleError when it is damaged."""
    with _as_bundle_error(bundle, name):
        found: CLIPTokenizer = CLIPTokenizer.from_pretrained(bundle.path / name, local_files_only=True)
        return found


def bundle_scheduler(bundle: Bundle) -> Any:
    """The scheduler that a bundle was exported with; BundleError when it is unknown or damaged."""
    found = bundle.json("model_index.json").get("scheduler")
    name = found[1] if isinstance(found, list) and len(found) == 2 else None
    if not isinstance(name, str) or not name.endswith("Scheduler") or not hasattr(diffusers, name):
        raise BundleError(f"bundle {str(bundle.path)!r} names an unknown scheduler {name!r}: export the model again")
    bundle.config("scheduler", "scheduler_config.json")
    with _as_bundle_error(bundle, "scheduler"):
        return getattr(diffusers, name).from_pretrained(bundle.path / "scheduler", local_files_only=True)


@contextlib.contextmanager
def _as_bundle_error(bundle: Bundle, part: str) -> Iterator[None]:
    """BundleError for whatever the libraries raise when files of a bundle are damaged."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BundleError(
            f"bundle {str(bundle.path)!r}: its {part} cannot be read ({reason}): restore it, or export the model again"
        ) from error
