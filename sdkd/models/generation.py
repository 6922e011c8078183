"""How a model is to be run: the steps, guidance scale and scheduler that it was made for, and what else is poor.

A few-step model draws badly with 25 steps and a guidance scale of 7.5; who trained it knows, and writes it down in its
folder. A folder without such a note may tell by its configs (`implied`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sdkd.core.conditions import guidance_width
from sdkd.core.numbers import DRAWING, check_number, check_numbers
from sdkd.core.schema import construct, problem
from sdkd.errors import InputError, ModelError
from sdkd.families import Family
from sdkd.models.schedulers import scheduler_class

GENERATION = "generation"  # key in a folder's sdkd.json and in the source of a bundle's manifest
FEW = 8  # steps of a few-step model, at most
CONSISTENCY = ("LCMScheduler", "TCDScheduler")
BUILT_IN_MOST = 2.0  # guidance scale that a model with built-in guidance still bears, for a negative prompt
FORM = "steps=4,guidance=1,scheduler=lcm"  # as a user writes one


@dataclass(frozen=True)
class Generation:
    """Denoising steps, guidance scale as diffusers counts it (1: none), and diffusers' class of the scheduler.

    `scheduler` None: the one that the model comes with. InputError for numbers that nothing is drawn with.
    """

    steps: int
    guidance_scale: float
    scheduler: str | None = None

    def __post_init__(self) -> None:
        check_numbers(asdict(self), DRAWING)

    def __str__(self) -> str:
        scheduler = "" if self.scheduler is None else f", {self.scheduler}"
        return f"{self.steps} step{'' if self.steps == 1 else 's'}, guidance {self.guidance_scale:g}{scheduler}"

    @property
    def few_steps(self) -> bool:
        """Whether it is that of a few-step model."""
        return self.steps <= FEW or self.scheduler in CONSISTENCY

    def with_asked(self, steps: int | None, guidance_scale: float | None, scheduler: str | None) -> Generation:
        """The same but for what is asked for; `scheduler` as `scheduler_class` takes it, which says what it raises."""
        named = None if scheduler is None else scheduler_class(scheduler).__name__
        asked: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale, "scheduler": named}
        return replace(self, **{name: value for name, value in asked.items() if value is not None})

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_json` reads it back."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Generation:
        """The inverse of `to_json`; TypeError on foreign data."""
        found: Generation = construct(data, Generation)
        return found


FEW_STEPS = Generation(4, 1.0, "LCMScheduler")  # of a consistency-distilled UNet without guidance embedding
EMBEDDED_FEW_STEPS = Generation(4, 8.5, "LCMScheduler")  # with it, as diffusers' LatentConsistencyModelPipeline draws
USUAL = Generation(25, 7.5)  # of any other model


def noted(about: Mapping[str, Any], where: str) -> Generation | None:
    """The entry in a folder's sdkd.json or a manifest's source; ModelError, which says `where`, when it is damaged."""
    if (data := about.get(GENERATION)) is None:
        return None
    try:
        if wrong := problem(data, Generation, GENERATION):
            raise InputError(wrong)
        return Generation.from_json(data)
    except InputError as error:
        raise ModelError(f"{where} says how it is to be run, and {error}: make it again") from error


def said(made: Generation | None, run: Generation) -> str | None:
    """In one line what is drawn with, and that the model was made for it or for what; None where nothing tells."""
    if made is None:
        return None
    return f"{run}: as the model was made for" if run == made else f"{run}; the model was made for {made}"


def entry(generation: Generation | None) -> dict[str, Any]:
    """What a folder's sdkd.json or a manifest's source has of it; nothing for None."""
    return {} if generation is None else {GENERATION: generation.to_json()}


def implied(unet_config: Mapping[str, Any], scheduler: str | None, pipeline: str | None = None) -> Generation | None:
    """What a model's configs tell: LCM's guidance embedding or pipeline, or the class of a consistency scheduler."""
    if guidance_width(unet_config) is not None or str(pipeline).startswith("LatentConsistencyModel"):
        return EMBEDDED_FEW_STEPS
    return replace(FEW_STEPS, scheduler=scheduler) if scheduler in CONSISTENCY else None


def named(family: Family, name: str) -> Generation | None:
    """What the name of a published few-step model tells (SDXL-Turbo, SDXL-Lightning): its steps, and no guidance."""
    found = filter(None, (row.of(Path(name).name) for row in family.few_steps))
    return next((Generation(steps, 1.0) for steps in found), None)


def parse_generation(text: str) -> Generation:
    """Read `steps=4,guidance=1,scheduler=lcm`; InputError for anything else, and as `scheduler_class`."""
    given = dict[str, str](part.strip().partition("=")[::2] for part in text.split(","))
    if set(given) != {"steps", "guidance", "scheduler"}:
        raise InputError(f"{text!r} does not say how a model is to be run: give all three of {FORM}")
    try:
        steps, guidance = int(given["steps"]), float(given["guidance"])
    except ValueError as error:
        raise InputError(f"{text!r} has a number that is none ({error}): give {FORM}") from error
    check_number("guidance", guidance, DRAWING["guidance_scale"].low, DRAWING["guidance_scale"].high)
    return Generation(steps, guidance).with_asked(None, None, given["scheduler"])


def warnings(
    made: Generation | None, run: Generation, *, embedded: bool = False, negative: str | None = None
) -> list[str]:
    """What a user should know of drawing with `run` on a model that was made for another; one line for each matter.

    `embedded`: the guidance scale goes into the UNet (`time_cond_proj_dim`), which then has no unconditional half, and
    for which `generate` refuses a negative prompt.
    """
    found = []
    if made is not None and made.few_steps:
        found = [line for line in (_steps(made, run), _guidance(made, run, embedded), _scheduler(made, run)) if line]
    if negative and run.guidance_scale <= 1:
        found.append(
            f"the negative prompt has no effect at guidance {run.guidance_scale:g}: give a guidance scale above 1, or "
            "leave it out"
        )
    return found


def _steps(made: Generation, run: Generation) -> str:
    if run.steps <= max(FEW, 2 * made.steps):
        return ""
    return f"{run.steps} steps on a model that was made for {made.steps}: more take longer and draw no better"


def _guidance(made: Generation, run: Generation, embedded: bool) -> str:
    if embedded or made.guidance_scale > 1 or run.guidance_scale <= 1:
        return ""
    much = "" if run.guidance_scale <= BUILT_IN_MOST else f", and above {BUILT_IN_MOST:g} its images are oversaturated"
    return (
        f"guidance {run.guidance_scale:g} on a model that has its guidance built in (made for "
        f"{made.guidance_scale:g}): every step computes twice as much{much}"
    )


def _scheduler(made: Generation, run: Generation) -> str:
    if run.scheduler in (None, made.scheduler) or {run.scheduler, made.scheduler} <= set(CONSISTENCY):
        return ""
    return f"{run.scheduler} on a model that was made for few steps of {made.scheduler}: its images are poor"
