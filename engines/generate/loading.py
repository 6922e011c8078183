"""A model opened for drawing: its target, its pipeline, and what it draws with where nothing else is asked for."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from sdkd.core.contract import native_size
from sdkd.core.profiles import ShapeRanges
from sdkd.errors import InputError
from sdkd.models.generation import USUAL, Generation
from sdkd.models.kinds import BundleSource
from sdkd.models.resolve import Model, load_eager, resolve
from sdkd.models.source import ModelSource
from sdkd.models.step_caching import cache_steps
from sdkd.targets.registry import check_target

Asked = tuple[int | None, float | None, str | None]
"""Steps, guidance scale and scheduler as options give them; None: what the model was made for."""


def drawn_with(source: ModelSource, asked: Asked) -> Generation:
    """The steps, guidance scale and scheduler of a request: as asked, else the model's, else the usual ones."""
    return (source.generation or USUAL).with_asked(*asked)


def choose_target(model: Model, target: str | None, *, control: bool = False, cache_interval: int = 1) -> str:
    """The target to draw on, `eager` without a bundle; InputError when a target is asked for without a bundle."""
    if target not in (None, "eager"):
        check_target(target)
    source = resolve(model)
    if target == "eager":
        return target
    if not isinstance(source, BundleSource):
        if target is not None:
            raise InputError(
                f"model {source.name!r} is not a bundle, so it has no {target} engine: build one with: "
                f"sdkd build-engine {shlex.quote(source.name)} --target {target} --output artifacts/bundle"
            )
        return "eager"
    if target is not None:
        return target
    from engines.pipelines.parts import best_slot

    parts = (*source.family.parts, *(["controlnet"] if control else []))
    return best_slot(source.bundle, parts, cached=cache_interval > 1)


def load(
    model: Model, target: str | None, *, control: bool = False, cache_interval: int = 1, low_memory: bool = False
) -> tuple[Any, str]:
    """The pipeline and the target that it runs on, with the bundle's ControlNet for `control`.

    `cache_interval` as in `engines.plug`, on a model that runs eagerly, too. `low_memory`: one stage of a bundle's
    engines is open at a time.

    Raises InputError when a target is asked for without a bundle, BundleError when the ControlNet has no engine.
    """
    source = resolve(model)
    slot = choose_target(source, target, control=control, cache_interval=cache_interval)
    if not isinstance(source, BundleSource) or slot == "eager":
        pipe = load_eager(source)
        cache_steps(pipe.unet, cache_interval)
        return pipe, slot
    from engines.pipelines.pipeline import load_pipeline

    bundle = source.bundle
    if control:
        bundle.engine(slot, "controlnet")
    return load_pipeline(bundle, slot, controlnet=control, low_memory=low_memory, cache_interval=cache_interval), slot


def image_size(pipe: Any) -> tuple[int, int]:
    """As `default_size`, of a pipeline that is open."""
    session = getattr(pipe.unet, "session", None)
    return default_size(
        native_size(pipe.unet.config, pipe.vae.config), session.checked.record.profiles if session else ()
    )


def default_size(native: tuple[int, int] | None, profiles: Sequence[ShapeRanges]) -> tuple[int, int]:
    """The model's native height and width, or the engine's best where it was not built for those; pixels."""
    height, width = native or (0, 0)
    if not profiles or any(height in ranges.height and width in ranges.width for ranges in profiles):
        return height, width
    return profiles[0].height.opt, profiles[0].width.opt
