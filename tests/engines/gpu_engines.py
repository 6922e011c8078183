"""Engines of the TensorRT kinds, and of PyTorch's compiler, for the GPU that is here, and why there may be none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_bundles import graph_unet
from small_exports import bundle_copy

from export.build.engines import build_engine
from export.build.options import BuildOptions
from sdkd.bundle.manifest import Bundle
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.targets.gpu_trial import CURRENT, capabilities, remembered, runs_portably
from sdkd.targets.nvidia import gpu
from sdkd.targets.registry import TARGETS, availability, environment, require

KINDS = ("tensorrt", "tensorrt-rtx")
WITH_GRAPHS = (*KINDS, "inductor")  # what runs through CUDA graphs
SMALL = ShapeRanges(Range(1, 1, 2), Range.fixed(32), Range.fixed(32), Range.fixed(77))
LARGE = ShapeRanges(Range.fixed(1), Range(32, 64, 64), Range(32, 64, 64), Range.fixed(77))


def usable(target: str) -> None:
    here = availability(target)
    if not (here.can_build and here.can_run):
        pytest.skip(f"{target}: {here.reason}")
    if TARGETS[target].builds_on_gpu or not (device := gpu()):
        return
    found, named = device["compute_capability"], capabilities(require(target))
    if named and found not in named and runs_portably(target) != found:
        pytest.skip(f"{target}: {found} is not named by the library, and no trial ran here: sdkd doctor --try")


def for_this_gpu(target: str) -> dict[str, Any]:
    """Options for what can be built for one GPU only; skips where a trial has shown that such a plan does not run."""
    if TARGETS[target].builds_on_gpu:
        return {}
    if failed := [trial for trial in remembered(target) if trial.plan == CURRENT and not trial.ran]:
        pytest.skip(failed[0].words())
    return {"compute_capabilities": (CURRENT,)}


def skip_foreign(bundle: Bundle, target: str) -> None:
    """Skip where this GPU is none of those that an ahead-of-time engine can be built for."""
    if reasons := bundle.stale_reasons(bundle.engine(target, "unet"), environment(target)):
        pytest.skip("; ".join(reasons))


def graph_for_gpu(folder: Path, target: str) -> Bundle:
    """A hand-written UNet in float16 for this GPU: 32 to 64 px, up to 2 images; skips where it cannot run."""
    usable(target)
    bundle = graph_unet(folder, "fp16", (target,))
    skip_foreign(bundle, target)
    return bundle


def on_gpu(feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in feeds.items()}


def same(one: torch.Tensor, other: torch.Tensor, kind: str) -> bool:
    """Bit for bit, but on TensorRT-RTX, which may change to faster kernels between two calls."""
    return torch.equal(one, other) if kind != "tensorrt-rtx" else torch.allclose(one, other, atol=2e-2)


def real_unet(folder: Path, kind: str, **options: Any) -> Bundle:
    """An exported UNet of two levels as an engine in float32, for this GPU."""
    usable(kind)
    if "refit" in options:
        options |= for_this_gpu(kind)
    bundle = build_engine(
        bundle_copy(folder), kind, precision="fp32", components=("unet",), options=BuildOptions(**options)
    )
    skip_foreign(bundle, kind)
    return bundle


def real_feeds(bundle: Bundle) -> dict[str, torch.Tensor]:
    sizes = {"batch": 2, "height": 16, "width": 16, "sequence": 77}
    generator = torch.Generator().manual_seed(0)
    specs = bundle.component("unet").contract.inputs
    feeds = {spec.name: torch.randn(spec.shape(sizes), generator=generator) for spec in specs}
    return feeds | {"timestep": torch.tensor(250.0)}
