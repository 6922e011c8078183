"""Runs every metric that can be measured here, one model in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.generate.long_prompts import cut_lines
from sdkd.compare.measure.calls import as_drawn
from sdkd.compare.measure.defaults import SMALL_GUIDANCE, RunsAsked, parse_prompts, runs_of
from sdkd.compare.measure.environment import versions
from sdkd.compare.measure.planning import find_roles
from sdkd.compare.measure.subjects import TEACHER
from sdkd.core.console import Progress, quiet, within
from sdkd.core.numbers import DRAWING, check_numbers
from sdkd.distill.data.rows import CAPTION_COLUMNS, check_columns
from sdkd.errors import InputError, SdkdError
from sdkd.evaluate.metrics import Drawn, RealImages, Reference, measure
from sdkd.evaluate.report import Evaluation, ModelResult
from sdkd.models.generation import Generation
from sdkd.models.resolve import ModelSource, load_eager, resolve
from sdkd.models.schedulers import use_scheduler
from sdkd.targets.registry import installed_version
from sdkd.toyworld.scenes import Scene, caption, held_out_scenes, sample_scenes, seen_scenes

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from sdkd.evaluate.agreement import Probe

DEMO = "demo"


@dataclass(frozen=True)
class Settings:
    """What is asked; None means: what suits the models. InputError when a number makes no sense.

    Steps, guidance scale and scheduler count for every model; None: as each was made to be run.
    """

    teacher: str | None = None
    data: str | None = None
    prompts: str | None = None
    real: Path | None = None
    images: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    seed: int = 0
    clip: Path | None = None
    inception: Path | None = None
    device: str = "cpu"
    image_column: str | None = None  # of the data; None: found
    caption_columns: tuple[str, ...] = CAPTION_COLUMNS

    def __post_init__(self) -> None:
        check_columns(self.caption_columns)
        table = DRAWING | {"images": DRAWING["count"]}
        check_numbers({name: getattr(self, name) for name in ("images", "steps", "guidance_scale", "seed")}, table)


@dataclass(frozen=True)
class Plan:
    """What is drawn: one prompt per image; `scenes` are those of the demo, the seen ones first."""

    prompts: tuple[str, ...]
    scenes: tuple[Scene, ...] = ()
    seen: int = 0


def find_teacher(models: Sequence[str], teacher: str | None = None) -> str | None:
    """The teacher: as given, else the first other model beside a student, else what a student's record names."""
    if teacher is not None:
        resolve(teacher)
        return teacher
    roles = find_roles(models)
    if named := [model for model, role in roles.items() if role == TEACHER]:
        return named[0]
    for model in models:
        name = resolve(model).provenance.get("teacher")
        if isinstance(name, str) and _exists(name):
            return name
    return None


def _exists(model: str) -> bool:
    try:
        return resolve(model).kind != "hub"  # a hub model is fetched only when it is asked for by name
    except SdkdError:
        return False


def evaluate(
    models: Sequence[str], settings: Settings, command: str | None = None, progress: Progress = quiet
) -> Evaluation:
    """Measure what can be measured here; whatever is missing is said per metric.

    Raises InputError and ModelError for what was given and cannot be used.
    """
    from sdkd.evaluate.agreement import draw_images

    if not models:
        raise InputError("nothing to evaluate: give at least one model")
    teacher = find_teacher(models, settings.teacher)
    names = [*([teacher] if teacher else []), *(model for model in dict.fromkeys(models) if model != teacher)]
    data, roles = _open(settings), find_roles(names)
    plan = _plan(names, settings, data)
    asked = RunsAsked(settings.steps, settings.guidance_scale, settings.scheduler)
    runs, poor = runs_of(names, asked, SMALL_GUIDANCE if _of_demo(settings) else None)
    _check_files(settings)
    real = RealImages(settings.real) if settings.real is not None else None
    reference = Reference("no teacher is known; give it with --teacher", None, real)
    results, cut = [], dict[str, None]()
    for place, name in enumerate(names):
        part = within(progress, place / len(names), (place + 1) / len(names), f"{name}: ")
        part("loading", 0.0)
        source, run = resolve(name), runs[name]
        pipe = _opened(source, run).to(settings.device)
        probe = _probe(pipe, data, settings, within(part, 0.0, 0.3)) if name == teacher else reference.probe
        cut |= dict.fromkeys(cut_lines(pipe, plan.prompts))
        images = draw_images(pipe, plan.prompts, run, seed=settings.seed, progress=within(part, 0.3, 0.8))
        if name == teacher:
            reference = Reference(probe, images, real)
        part("scores", 0.8)
        drawn = Drawn(images, plan.prompts, plan.scenes, plan.seen)
        metrics = measure(pipe, drawn, reference, settings.clip, settings.inception)
        role = TEACHER if name == teacher else roles[name]
        parameters = sum(parameter.numel() for parameter in pipe.unet.parameters())
        results.append(ModelResult(name, role, source.random_weights, parameters, _drawn_with(pipe, run), metrics))
    known = versions() | {
        name: found for name in ("torchmetrics", "torch-fidelity") if (found := installed_version(name))
    }
    notes = (*_notes(plan, reference), *(f"{line}." for line in poor), *cut)
    return Evaluation(tuple(results), _settings(settings, plan, teacher), known, command, notes)


def _opened(source: ModelSource, run: Generation) -> StableDiffusionPipeline:
    """An eager pipeline with the scheduler of its run; text-to-image whatever its class."""
    pipe: StableDiffusionPipeline = as_drawn(load_eager(source))
    use_scheduler(pipe, run.scheduler)
    return pipe


def _drawn_with(pipe: StableDiffusionPipeline, run: Generation) -> Generation:
    return replace(run, scheduler=type(pipe.scheduler).__name__)


def _of_demo(settings: Settings) -> bool:
    return settings.prompts is None and settings.data == DEMO


def _plan(models: Sequence[str], settings: Settings, data: Any) -> Plan:
    if _of_demo(settings):
        count = settings.images or 64
        seen, held = (sample_scenes(scenes(), count, settings.seed) for scenes in (seen_scenes, held_out_scenes))
        return Plan(tuple(map(caption, (*seen, *held))), (*seen, *held), len(seen))
    from_data = settings.prompts is None and settings.data
    kept = _captions(data, settings) if from_data else parse_prompts(settings.prompts, models)
    return Plan(tuple(kept[place % len(kept)] for place in range(settings.images or len(kept))))


def _captions(data: Any, settings: Settings) -> tuple[str, ...]:
    """Captions of the data, at most as many as images are drawn; where one is missing the next stands for it."""
    from sdkd.distill.data.reader import Reader
    from sdkd.distill.data.rows import caption_at

    count = min(len(data), settings.images or 16)
    if (captions := getattr(data, "captions", None)) is not None:  # a cache
        return tuple(captions[:count])
    reader = Reader(lambda _, index: caption_at(data, index), len(data), workers=0)
    return tuple(caption for _, caption in reader.rows((index, index) for index in range(count)))


def _check_files(settings: Settings) -> None:
    """InputError for weights that were given and are not there: before any image is drawn."""
    from sdkd.compare.measure.scores import find_clip, find_inception

    if settings.clip is not None:
        find_clip(settings.clip, "")
    if settings.inception is not None:
        find_inception(settings.inception)


def _probe(pipe: StableDiffusionPipeline, data: Any, settings: Settings, progress: Progress) -> Probe | str:
    from sdkd.evaluate.agreement import make_probe

    if data is None:
        return "it needs images with captions; give a folder of them, or demo, with --data"
    try:
        return make_probe(pipe, data, settings.images or 64, settings.seed, progress)
    except SdkdError as error:
        return str(error)


def _open(settings: Settings) -> Any:
    """The images to ask about: of the demo those that nothing is trained on, of other data as they come, or None."""
    if settings.data is None:
        return None
    if settings.data == DEMO:
        from sdkd.toyworld.scenes import DemoImages

        return DemoImages(settings.images or 64, settings.seed, held_out=True)
    from sdkd.distill.data.opening import open_images_or_cache

    return open_images_or_cache(settings.data, settings.image_column, settings.caption_columns)


def _settings(settings: Settings, plan: Plan, teacher: str | None) -> dict[str, Any]:
    return {
        "teacher": teacher,
        "data": settings.data,
        "prompts": list(plan.prompts),
        "real": None if settings.real is None else str(settings.real),
        "images": len(plan.prompts),
        "steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "scheduler": settings.scheduler,
        "seed": settings.seed,
        "seeds": [settings.seed + place for place in range(len(plan.prompts))],
        "device": settings.device,
        "precision": "fp32",
    }


def _notes(plan: Plan, reference: Reference) -> tuple[str, ...]:
    from sdkd.compare.measure.scores import FEATURES

    real, probe = reference.real, reference.probe
    notes = []
    if real is not None and min(len(plan.prompts), len(real)) < FEATURES:
        notes.append(
            f"FID of fewer than {FEATURES} images of a kind is biased upwards, not comparable with published values; "
            "CMMD needs fewer."
        )
    lost = {"left out": real.unreadable if real else {}, "replaced": {} if isinstance(probe, str) else probe.unreadable}
    for what, unreadable in lost.items():
        if unreadable:
            notes.append(
                f"{len(unreadable)} images could not be read and were {what}: {'; '.join(unreadable.values())}"
            )
    return tuple(notes)
