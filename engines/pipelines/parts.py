"""The parts of a pipeline that engines can stand for, which slot has engines of them, and whether they fit."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdkd.bundle.manifest import Bundle
from sdkd.core.components import CACHED_UNET
from sdkd.core.conditions import INNER_RESIDUAL, MID_RESIDUAL, image_specs
from sdkd.core.contract import is_tiny_vae, vae_scale
from sdkd.errors import BundleError, EngineError, InputError, MissingExtraError, ModelError, StaleEngineError
from sdkd.models.exportable import check_config, check_controlnet, check_extra_parts, check_guidance, module_config
from sdkd.models.ip_adapter import check_projections, image_prompts
from sdkd.models.step_caching import check_cached, check_interval
from sdkd.targets.registry import availability, check_target, environment, runs_on_gpu

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One module of a pipeline: the engine it needs, one it can use, and what must agree with the eager module."""

    engine: str
    agree: tuple[str, ...]
    optional: str = ""


# What the weights of a UNet or ControlNet do not show, and changes what they compute.
_BLOCKS = (
    *("attention_head_dim", "num_attention_heads", "act_fn", "norm_num_groups", "norm_eps"),
    *("flip_sin_to_cos", "freq_shift", "resnet_time_scale_shift"),
)
_TEXT = ("hidden_size", "vocab_size", "max_position_embeddings", "num_attention_heads", "hidden_act", "layer_norm_eps")
PARTS: dict[str, Part] = {
    "unet": Part("unet", ("in_channels", "out_channels", "cross_attention_dim", *_BLOCKS, "center_input_sample")),
    "vae": Part("vae_decoder", ("latent_channels", "scaling_factor", "act_fn", "norm_num_groups"), "vae_encoder"),
    "text_encoder": Part("text_encoder", _TEXT),
    "text_encoder_2": Part("text_encoder_2", (*_TEXT, "projection_dim")),
    "controlnet": Part("controlnet", ("cross_attention_dim", "conditioning_channels", *_BLOCKS)),
}
OTHER_PARTS = ("text_encoder_3", "transformer", "prior")  # of families that sdkd does not know
# Of targets, the fastest first, and before those of a CPU what runs on a GPU: `inductor` is one of either.
ORDER = ("tensorrt", "tensorrt-rtx", "openvino", "onnxruntime", "inductor")


def engine_names(bundle: Bundle, slot: str, parts: Sequence[str], *, cached: bool = False) -> list[str]:
    """The components whose engines a slot has for these parts: the needed ones, and the optional ones there are.

    `cached`: with that of the UNet's last layer, for step caching.
    """
    names = ((PARTS[part].engine, PARTS[part].optional) for part in parts)
    built = bundle.manifest.engines
    found = [name for need, more in names for name in (need, more) if name == need or f"{slot}/{name}" in built]
    return [*found, CACHED_UNET] if cached and "unet" in parts else found


def check_agreement(pipe: Any, bundle: Bundle, parts: Sequence[str]) -> None:
    """ModelError, naming both values, when a bundle's component does not fit where a pipeline has its own."""
    if "unet" in parts:
        check_extra_parts(pipe)
        check_images(pipe.unet, bundle)
    for part in parts:
        theirs = module_config(getattr(pipe, part))
        check_config(part, theirs)
        ours = bundle.config(PARTS[part].engine)
        if part == "unet":
            check_guidance(type(pipe).__name__, ours, "this pipeline")
        values = {key: (ours.get(key), theirs.get(key)) for key in PARTS[part].agree}
        if part == "vae":
            values = {"pixels per latent": (vae_scale(ours), vae_scale(theirs))} | values
            if is_tiny_vae(ours) != is_tiny_vae(theirs):  # each kind scales and computes in its own way
                values = {key: values[key] for key in ("pixels per latent", "latent_channels")}
        _refuse_differences(bundle, part, values)
    scheduler = bundle.path / "scheduler" / "scheduler_config.json"
    if "unet" in parts and scheduler.is_file():
        ours = bundle.json("scheduler/scheduler_config.json")
        key = "prediction_type"
        _refuse_differences(bundle, "scheduler", {key: (ours.get(key), getattr(pipe.scheduler.config, key, None))})


def check_images(unet: Any, bundle: Bundle) -> None:
    """ModelError unless a pipeline's UNet has IP-Adapters like those of a bundle's, or neither has any.

    They are alike in number and in the widths of what they read; weights are compared with the others.
    """
    engine = getattr(unet, "session", None)
    if engine is None:
        check_projections(unet)
    specs = image_specs(bundle.component("unet").contract)
    ours = [spec.axes[2:] for spec in specs]
    theirs = (
        list(image_prompts(unet).embeddings) if engine is None else [s.axes[2:] for s in image_specs(engine.contract)]
    )
    if [(len(axes), axes[-1]) for axes in ours] == [(len(axes), axes[-1]) for axes in theirs]:
        return
    what = f"bundle {str(bundle.path)!r} has {_read(ours)} in its UNet and this pipeline {_read(theirs)}"
    if not ours:
        raise ModelError(f"{what}: export this pipeline, or its model with --ip-adapter FILE")
    raise ModelError(f"{what}: load the same with pipe.load_ip_adapter first, or use engines.load_pipeline")


def _read(embeddings: Sequence[Sequence[Any]]) -> str:
    """IP-Adapters in words."""
    widths = " and ".join(str(axes[-1]) for axes in embeddings)
    return f"IP-Adapters that read embeddings of width {widths}" if widths else "no IP-Adapter"


def _refuse_differences(bundle: Bundle, part: str, values: Mapping[str, tuple[object, object]]) -> None:
    for key, (ours, theirs) in values.items():
        if ours is not None and theirs is not None and not _same(ours, theirs):
            raise ModelError(
                f"bundle {str(bundle.path)!r} does not fit this pipeline: {part} {key} is {ours} in the bundle and "
                f"{theirs} in the pipeline. Plug it into the pipeline that it was exported from, "
                "or use engines.load_pipeline"
            )


def _same(one: object, other: object) -> bool:
    """Equality of config values, where a number may stand for as many of it as there are levels."""
    values = [tuple(value) if isinstance(value, list | tuple) else (value,) for value in (one, other)]
    longest = max(map(len, values))
    return len({value * longest if len(value) == 1 else value for value in values}) == 1


def chosen_parts(components: Sequence[str] | str | None, pipe: Any, bundle: Bundle) -> tuple[str, ...]:
    """What to plug: by default the pipeline's own parts, one ControlNet included where the bundle has one.

    InputError for no name or an unknown one; ModelError for a pipeline of another kind, for a part that the pipeline
    has not, and for a ControlNet or T2I-Adapter beside a UNet without its inputs.
    """
    usual = bundle.family.parts
    if {name for name in (*PARTS, *OTHER_PARTS) if hasattr(pipe, name)} - {"controlnet"} != set(usual):
        raise ModelError(
            f"{type(pipe).__name__} is no pipeline of {bundle.family.title}, which bundle {str(bundle.path)!r} is of: "
            f"plug needs one with {', '.join(usual)}"
        )
    there = [name for name in PARTS if getattr(pipe, name, None) is not None]
    single = getattr(pipe, "controlnet", None) is not None and not hasattr(pipe.controlnet, "nets")
    chosen = part_names(components, [name for name in usual if name in there])
    if missing := [name for name in chosen if name not in there]:
        raise ModelError(f"this {type(pipe).__name__} has no {missing[0]} to plug: leave it out of components")
    if "controlnet" in chosen and not single:
        raise ModelError(
            f"this {type(pipe).__name__} has {len(pipe.controlnet.nets)} ControlNets, and a bundle holds one: leave "
            "controlnet out of components, and they stay eager beside the engines"
        )
    takes = {spec.name for spec in bundle.component("unet").contract.inputs} if "unet" in chosen else {MID_RESIDUAL}
    if "controlnet" in there and MID_RESIDUAL not in takes:
        raise ModelError(
            f"the UNet of bundle {str(bundle.path)!r} has no inputs for this {type(pipe).__name__}'s ControlNet: "
            "export the model again with --controlnet FOLDER"
        )
    if getattr(pipe, "adapter", None) is not None and "unet" in chosen and f"{INNER_RESIDUAL}.0" not in takes:
        raise ModelError(
            f"the UNet of bundle {str(bundle.path)!r} has no inputs for this {type(pipe).__name__}'s T2I-Adapter: "
            "export the model again with --t2i-adapter"
        )
    if "controlnet" in there and "unet" in chosen:
        for net in getattr(pipe.controlnet, "nets", [pipe.controlnet]):
            if "block_out_channels" in net.config:  # other kinds of ControlNet have other layouts
                check_controlnet(net.config, bundle.config("unet"))
    ours = "controlnet" in bundle.manifest.components
    return (*chosen, "controlnet") if components is None and single and ours else chosen


def part_names(components: Sequence[str] | str | None, usual: Sequence[str]) -> tuple[str, ...]:
    """The names in `components`, one name or several, each once; `usual` for None. InputError as above."""
    names = (components,) if isinstance(components, str) else tuple(usual if components is None else components)
    for name in names:
        if name not in PARTS:
            raise InputError(f"component {name!r} is unknown: choose from {', '.join(PARTS)}")
    if not names:
        raise InputError(f"components is empty: choose from {', '.join(PARTS)}, or leave it out for all that there are")
    return tuple(dict.fromkeys(names))


def check_caching(bundle: Bundle, parts: Sequence[str], interval: int) -> bool:
    """Whether steps are to be cached; InputError for another interval than a whole number from 1, or without the UNet,
    BundleError for a bundle that was not exported for it.
    """
    check_interval(interval)
    if interval == 1:
        return False
    if "unet" not in parts:
        raise InputError(f"cache interval {interval} is for the UNet's engine: have unet among the components")
    check_cached(bundle)
    return True


def best_slot(bundle: Bundle, parts: Sequence[str] | None = None, *, cached: bool = False) -> str:
    """The fastest slot whose engines are complete, fresh and run here; EngineError lists why each one is not.

    `parts`: of a pipeline; None for all of its family's. `cached`: the one for step caching, too.
    """
    parts = bundle.family.parts if parts is None else parts
    slots = sorted(bundle.slots(), key=lambda slot: (_rank(slot), slot != check_target(slot).name))
    refused: dict[str, str] = {}
    for slot in slots:
        reason = why_not(bundle, slot, parts, cached=cached)
        if reason is None:
            for other, text in refused.items():
                log.warning("engine %s was passed over for %s: %s", other, slot, text)
            return slot
        refused[slot] = reason
    found = "; ".join(f"{slot}: {reason}" for slot, reason in refused.items()) or "it has none"
    ranked = sorted(ORDER, key=_rank)
    runnable = next((name for name in ranked if (here := availability(name)).can_run and here.can_build), "onnxruntime")
    raise EngineError(
        f"no engine of {str(bundle.path)!r} runs here ({found}). Build one with: {bundle.build_command(runnable)}"
    )


def _rank(slot: str) -> tuple[bool, int]:
    """Sorts slots and targets: the fastest here first."""
    kind = check_target(slot)
    return not runs_on_gpu(kind), ORDER.index(kind.name)


def why_not(bundle: Bundle, slot: str, parts: Sequence[str], *, cached: bool = False) -> str | None:
    """Why a slot's engines cannot run here, in words with the repair, or None when they can. Files are not read."""
    here = availability(check_target(slot).name)
    if not here.can_run:
        return f"{here.reason} ({here.fix})"
    try:
        for name in (*(PARTS[part].engine for part in parts), *([CACHED_UNET] if cached else [])):
            record = bundle.engine(slot, name)
            bundle.check_fresh(record, environment(record.target))
    except (BundleError, StaleEngineError, MissingExtraError) as error:
        return str(error)
    return None
