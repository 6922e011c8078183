"""Runs every metric that can be measured here, one model in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engines.generate.long_prompts import cut_lines
from sdkd.compare.measure.environment import versions
from sdkd.compare.measure.planning import SMALL_GUIDANCE, default_guidance, find_roles, parse_prompts
from sdkd.compare.measure.subjects import TEACHER
from sdkd.core.console import Progress, quiet, within
from sdkd.errors import InputError, SdkdError
from sdkd.evaluate.metrics import Plan, Reference, Settings, measure
from sdkd.evaluate.real_images import RealImages
from sdkd.evaluate.report import Evaluation, ModelResult
from sdkd.models.resolve import load_eager, resolve
from sdkd.targets.registry import installed_version
from sdkd.toyworld.scenes import caption, held_out_scenes, sample_scenes, seen_scenes

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image

    from sdkd.evaluate.agreement import Probe

DEMO = "demo"
_EXTRAS = ("torchmetrics", "torch-fidelity")


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
    if not models:
        raise InputError("nothing to evaluate: give at least one model")
    teacher = find_teacher(models, settings.teacher)
    names = [*([teacher] if teacher else []), *(model for model in dict.fromkeys(models) if model != teacher)]
    data, roles = _open(settings), find_roles(names)
    plan = _plan(names, settings, data)
    _check_files(settings)
    real = RealImages(settings.real) if settings.real is not None else None
    reference = Reference("no teacher is known; give it with --teacher", None, real)
    results, cut = [], dict[str, None]()
    for place, name in enumerate(names):
        part = within(progress, place / len(names), (place + 1) / len(names), f"{name}: ")
        part("loading", 0.0)
        source = resolve(name)
        pipe = load_eager(source).to(settings.device)
        if name == teacher:
            reference = Reference(_probe(pipe, data, settings, within(part, 0.0, 0.3)), None, real)
        cut |= dict.fromkeys(cut_lines(pipe, plan.prompts))
        images = _draw(pipe, plan, settings, within(part, 0.3, 0.8))
        if name == teacher:
            reference = Reference(reference.probe, images, real)
        part("scores", 0.8)
        metrics = measure(pipe, images, plan, settings, reference)
        role = TEACHER if name == teacher else roles[name]
        parameters = sum(parameter.numel() for parameter in pipe.unet.parameters())
        results.append(ModelResult(name, role, source.random_weights, parameters, metrics))
    notes = (*_notes(plan, reference), *cut)
    return Evaluation(tuple(results), _settings(settings, plan, teacher), _versions(), command, notes)


def _plan(models: Sequence[str], settings: Settings, data: Any) -> Plan:
    if settings.prompts is None and settings.data == DEMO:
        count = settings.images or 64
        seen, held = (
            sample_scenes(seen_scenes(), count, settings.seed),
            sample_scenes(held_out_scenes(), count, settings.seed),
        )
        scenes = (*seen, *held)
        scale = SMALL_GUIDANCE if settings.guidance_scale is None else settings.guidance_scale
        return Plan(tuple(caption(scene) for scene in scenes), scenes, len(seen), scale)
    scale = default_guidance(models) if settings.guidance_scale is None else settings.guidance_scale
    kept = (
        _captions(data, settings)
        if settings.prompts is None and settings.data
        else parse_prompts(settings.prompts, models)
    )
    count = settings.images or len(kept)
    return Plan(tuple(kept[place % len(kept)] for place in range(count)), (), 0, scale)


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


def _draw(pipe: StableDiffusionPipeline, plan: Plan, settings: Settings, progress: Progress) -> list[Image]:
    from sdkd.evaluate.agreement import draw_images

    return draw_images(
        pipe,
        plan.prompts,
        steps=settings.steps,
        guidance_scale=plan.guidance_scale,
        seed=settings.seed,
        progress=progress,
    )


def _settings(settings: Settings, plan: Plan, teacher: str | None) -> dict[str, Any]:
    return {
        "teacher": teacher,
        "data": settings.data,
        "prompts": list(plan.prompts),
        "real": None if settings.real is None else str(settings.real),
        "images": len(plan.prompts),
        "steps": settings.steps,
        "guidance_scale": plan.guidance_scale,
        "seed": settings.seed,
        "seeds": [settings.seed + place for place in range(len(plan.prompts))],
        "device": settings.device,
        "precision": "fp32",
    }


def _versions() -> dict[str, str]:
    return versions() | {name: found for name in _EXTRAS if (found := installed_version(name))}


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
