"""Runs every metric that can be measured here, one model in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkd.compare.environment import versions
from sdkd.compare.planning import SMALL_GUIDANCE, default_guidance, find_roles, parse_prompts
from sdkd.compare.subjects import TEACHER
from sdkd.console import Progress, quiet, within
from sdkd.demo.scenes import caption, held_out_scenes, sample_scenes, seen_scenes
from sdkd.errors import InputError, SdkdError
from sdkd.evaluate.metrics import Plan, Reference, Settings, measure
from sdkd.evaluate.report import Evaluation, ModelResult
from sdkd.models import load_eager, provenance, resolve
from sdkd.targets import installed_version

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
        source = resolve(model)
        name = provenance(source.path).get("teacher") if source.path is not None and source.path.is_dir() else None
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
    plan, roles = _plan(names, settings), find_roles(names)
    _check_files(settings)
    real = read_folder(settings.real) if settings.real is not None else None
    reference = Reference("no teacher is known; give it with --teacher", None, real)
    results = []
    for place, name in enumerate(names):
        part = within(progress, place / len(names), (place + 1) / len(names), f"{name}: ")
        part("loading", 0.0)
        pipe = load_eager(name).to(settings.device)
        if name == teacher:
            reference = Reference(_probe(pipe, settings, within(part, 0.0, 0.3)), None, real)
        images = _draw(pipe, plan, settings, within(part, 0.3, 0.8))
        if name == teacher:
            reference = Reference(reference.probe, images, real)
        part("scores", 0.8)
        metrics = measure(pipe, images, plan, settings, reference)
        role = TEACHER if name == teacher else roles[name]
        parameters = sum(parameter.numel() for parameter in pipe.unet.parameters())
        results.append(ModelResult(name, role, resolve(name).random_weights, parameters, metrics))
    return Evaluation(tuple(results), _settings(settings, plan, teacher), _versions(), command, _notes(plan, real))


def _plan(models: Sequence[str], settings: Settings) -> Plan:
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
        _captions(settings) if settings.prompts is None and settings.data else parse_prompts(settings.prompts, models)
    )
    count = settings.images or len(kept)
    return Plan(tuple(kept[place % len(kept)] for place in range(count)), (), 0, scale)


def _captions(settings: Settings) -> tuple[str, ...]:
    """Captions of the data, at most as many as images are drawn."""
    from sdkd.distill.data import caption_at, open_images

    images = open_images(str(settings.data))
    return tuple(caption_at(images, index) for index in range(min(len(images), settings.images or 16)))


def _check_files(settings: Settings) -> None:
    """InputError for weights that were given and are not there: before any image is drawn."""
    from sdkd.scores import find_clip, find_inception

    if settings.clip is not None:
        find_clip(settings.clip, "")
    if settings.inception is not None:
        find_inception(settings.inception)


def read_folder(folder: Path) -> list[Image]:
    """All images under a folder, RGB, by name; InputError when it holds none or one cannot be read."""
    from sdkd.distill.data import SUFFIXES, decode

    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"folder {str(folder)!r} holds no images ({', '.join(SUFFIXES)}): give one with real images")
    return [decode(path, f"image {str(path)!r}") for path in files]


def _probe(pipe: StableDiffusionPipeline, settings: Settings, progress: Progress) -> Probe | str:
    from sdkd.evaluate.agreement import make_probe

    if settings.data is None:
        return "it needs images with captions; give a folder of them, or demo, with --data"
    try:
        return make_probe(pipe, _held_out(settings), settings.images or 64, settings.seed, progress)
    except SdkdError as error:
        return str(error)


def _held_out(settings: Settings) -> Any:
    """The images to ask about: of the demo those that nothing is trained on, of other data as they come."""
    if settings.data == DEMO:
        from sdkd.demo.dataset import DemoImages

        return DemoImages(settings.images or 64, settings.seed, held_out=True)
    from sdkd.distill.data import open_images

    return open_images(str(settings.data))


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


def _notes(plan: Plan, real: Sequence[Image] | None) -> tuple[str, ...]:
    from sdkd.scores import FEATURES

    if real is not None and min(len(plan.prompts), len(real)) < FEATURES:
        return (
            f"FID of fewer than {FEATURES} images of a kind is biased upwards, not comparable with published values; "
            "CMMD needs fewer.",
        )
    return ()
