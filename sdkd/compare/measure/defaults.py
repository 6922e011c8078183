"""What is drawn where nothing is asked for: prompts, each model's steps and guidance scale, the images' judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sdkd.compare.measure.calls import Size
from sdkd.core.conditions import guidance_width
from sdkd.core.text_files import prompts_of
from sdkd.errors import BundleError, ModelError
from sdkd.models.generation import USUAL, Generation, warnings
from sdkd.models.kinds import BundleSource
from sdkd.models.resolve import Model, ModelSource, resolve

if TYPE_CHECKING:
    from sdkd.compare.measure.outcome import Judge

SMALL_PX = 64  # models of at most this size are trained on drawn shapes, like the demo's
SHAPES = (
    "a large red star on a white background",
    "a large yellow heart on a blue background",
    "a medium green circle on a black background",
    "a large blue cross on a yellow background",
)
PHOTOGRAPHS = (
    "a photograph of an astronaut riding a horse",
    "a watercolour of a lighthouse at dusk",
    "a bowl of oranges on a wooden table, soft morning light",
)
SMALL_GUIDANCE = 4.0  # suits drawn shapes


def parse_prompts(text: str | None, models: Sequence[Model]) -> tuple[str, ...]:
    """Prompts from a file (one per line) or `a;b`; by default such as the models know. InputError when empty."""
    if text is None:
        return SHAPES if all(map(_is_small, models)) else PHOTOGRAPHS
    return prompts_of(text)


def default_guidance(models: Sequence[Model]) -> float:
    """The guidance scale that suits models which do not say how they are to be run."""
    return SMALL_GUIDANCE if all(map(_is_small, models)) else USUAL.guidance_scale


@dataclass(frozen=True)
class RunsAsked:
    """What counts for every model; None: as each model is made to be run. `guidance_scale` in diffusers' scale."""

    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None  # as `sdkd generate` takes it


AS_MADE = RunsAsked()


def runs_of(
    models: Sequence[Model], asked: RunsAsked, usual_guidance: float | None = None
) -> tuple[dict[str, Generation], list[str]]:
    """How each model is run, by its name, and what is poor about that; nothing is loaded.

    A model that does not say what it was made for takes the usual steps, its own scheduler, and `usual_guidance` or
    what suits all. InputError for a wish that nothing can be drawn with.
    """
    scale = default_guidance(models) if usual_guidance is None else usual_guidance
    usual, found, notes = replace(USUAL, guidance_scale=scale), dict[str, Generation](), list[str]()
    for source in map(resolve, models):
        try:
            made, embedded = source.generation, guidance_width(_unet_config(source)) is not None
        except (ModelError, BundleError) as error:
            made, embedded = None, False
            notes.append(f"{_short(source)}: how it is to be run could not be read ({error})")
        run = (made or usual).with_asked(asked.steps, asked.guidance_scale, asked.scheduler)
        found[source.name] = run
        notes += [f"{_short(source)}: {line}" for line in warnings(made, run, embedded=embedded)]
    return found, notes


def _short(source: ModelSource) -> str:
    return Path(source.name).name or source.name


def _unet_config(source: ModelSource) -> Mapping[str, object]:
    """A bundle of other parts has none."""
    parts = source.bundle.manifest.components if isinstance(source, BundleSource) else {"unet"}
    return source.unet_config if "unet" in parts else {}


def default_judge(models: Sequence[Model], prompts: Sequence[str], size: Size | None) -> Judge | None:
    """The reader of drawn shapes, where all models are small and all prompts are captions of such drawings."""
    from sdkd.toyworld.reader import LEAST_PX, are_captions, judge_captions

    sources = [resolve(model) for model in models]
    sides = [side for source in sources if (side := native_px(source)) is not None and side <= SMALL_PX]
    readable = (
        all(map(_from_text_alone, sources))
        and len(sides) == len(sources)
        and (min(size) if size else min(sides, default=0)) >= LEAST_PX
    )
    return judge_captions if readable and are_captions(prompts) else None


def _from_text_alone(source: ModelSource) -> bool:
    """Whether a model of this machine draws from prompts, not from images, too."""
    if isinstance(source, BundleSource) and "controlnet" in source.bundle.manifest.components:
        return False
    return not source.here or int(source.unet_config.get("in_channels", 4)) == 4


def _is_small(model: Model) -> bool:
    side = native_px(resolve(model))
    return side is not None and side <= SMALL_PX


def native_px(source: ModelSource) -> int | None:
    """The side of a model's own images in pixels, from configs of this machine; None where they do not tell."""
    size = source.native_size if source.here else None
    return size[0] if size is not None and size[0] == size[1] else None
