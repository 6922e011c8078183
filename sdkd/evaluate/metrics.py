"""Every metric of one model: its values, or why it cannot be measured here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkd.compare.measure.quality import likeness
from sdkd.compare.measure.subjects import TEACHER
from sdkd.distill.data.rows import CAPTION_COLUMNS, check_columns
from sdkd.errors import InputError, ModelError
from sdkd.evaluate.report import CAPTIONS, CLIP, CMMD, FID, NOISE, PSNR, Metric
from sdkd.toyworld.accuracy import CaptionAccuracy
from sdkd.toyworld.reader import read_image
from sdkd.toyworld.scenes import Scene

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image

    from sdkd.evaluate.agreement import Probe
    from sdkd.evaluate.real_images import RealImages

_NO_REAL = "it needs real images; give a folder of them with --real"
_NO_TEACHER = "no teacher is known; give it with --teacher"


@dataclass(frozen=True)
class Settings:
    """What is asked; None means: what suits the models. InputError when a number makes no sense."""

    teacher: str | None = None
    data: str | None = None
    prompts: str | None = None
    real: Path | None = None
    images: int | None = None
    steps: int = 25
    guidance_scale: float | None = None
    seed: int = 0
    clip: Path | None = None
    inception: Path | None = None
    device: str = "cpu"
    image_column: str | None = None  # of the data; None: found
    caption_columns: tuple[str, ...] = CAPTION_COLUMNS

    def __post_init__(self) -> None:
        check_columns(self.caption_columns)
        for name in ("images", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} {value} is not a number of {name}: give 1 or more")


@dataclass(frozen=True)
class Plan:
    """What is drawn: one prompt per image; `scenes` are those of the demo, the seen ones first."""

    prompts: tuple[str, ...]
    scenes: tuple[Scene, ...]
    seen: int
    guidance_scale: float


@dataclass(frozen=True)
class Reference:
    """What models are held against: the teacher's answers and images, and the real images."""

    probe: Probe | str  # or why there is none
    images: Sequence[Image] | None
    real: RealImages | None


def measure(
    pipe: StableDiffusionPipeline, images: Sequence[Image], plan: Plan, settings: Settings, reference: Reference
) -> dict[str, Metric]:
    """All metrics by name; InputError for a file that was given and cannot be used."""
    return {
        NOISE: _or_why(lambda: _noise(pipe, reference.probe)),
        PSNR: _or_why(lambda: _psnr(images, reference.images)),
        CAPTIONS: _or_why(lambda: _accuracy(images, plan)),
        CLIP: _or_why(lambda: _clip(images, plan.prompts, settings)),
        FID: _or_why(lambda: _fid(images, reference.real, settings)),
        CMMD: _or_why(lambda: _cmmd(images, reference.real, settings)),
    }


def _or_why(measure: Callable[[], Mapping[str, Any] | str]) -> Metric:
    """The metric, or why there is none: a message of ours is a reason, anything else a bug."""
    from sdkd.compare.measure.scores import NotMeasuredError

    try:
        found = measure()
    except (NotMeasuredError, ModelError) as error:
        return Metric(not_measured=str(error))
    if isinstance(found, str):
        return Metric(not_measured=found)
    metric = Metric(found)
    head = metric.headline
    return metric if head is None or math.isfinite(head) else Metric(not_measured="its value is not finite")


def _noise(pipe: StableDiffusionPipeline, probe: Probe | str) -> Mapping[str, Any] | str:
    from sdkd.evaluate.agreement import noise_agreement

    if isinstance(probe, str):
        return probe
    found = noise_agreement(pipe, probe)
    return {"mean": found.mean, "buckets": found.buckets, "edges": probe.edges, "per_image": found.per_image}


def _psnr(images: Sequence[Image], of_teacher: Sequence[Image] | None) -> Mapping[str, Any] | str:
    if of_teacher is None:
        return _NO_TEACHER
    if images[0].size != of_teacher[0].size:
        return f"its images are {images[0].size} pixels, the teacher's {of_teacher[0].size}"
    found = likeness(images, of_teacher, TEACHER)
    return {
        "mean": found.psnr_mean_db,
        "worst": found.psnr_min_db,
        "identical": found.identical,
        "per_image": [one.psnr_db for one in found.per_image],  # null: identical
    }


def _accuracy(images: Sequence[Image], plan: Plan) -> Mapping[str, Any] | str:
    if not plan.scenes:
        return "only the demo's captions can be judged; ask for them with --data demo and no --prompts"
    readings = [read_image(image) for image in images]
    parts = {"seen": slice(None, plan.seen), "held_out": slice(plan.seen, None)}
    found = {name: CaptionAccuracy(plan.scenes[part], tuple(readings[part])) for name, part in parts.items()}
    agreed = [reading.agrees(scene) for reading, scene in zip(readings, plan.scenes, strict=True)]
    means = {name: sum(one.accuracy.values()) / len(one.accuracy) for name, one in found.items()}
    return {
        "mean": sum(means.values()) / len(means),
        **means,
        "by_attribute": {name: one.accuracy for name, one in found.items()},
        "per_image": agreed,
    }


def _clip(images: Sequence[Image], prompts: Sequence[str], settings: Settings) -> Mapping[str, Any]:
    from sdkd.compare.measure.scores import CLIP_SCORE_MODEL, clip_scores, find_clip, load_clip

    model, processor = load_clip(find_clip(settings.clip, CLIP_SCORE_MODEL), settings.device)
    scores = clip_scores(model, processor, images, prompts)
    judge = str(settings.clip or CLIP_SCORE_MODEL)
    return {"mean": sum(scores) / len(scores), "model": judge, "per_image": scores}


def _fid(images: Sequence[Image], real: RealImages | None, settings: Settings) -> Mapping[str, Any] | str:
    from sdkd.compare.measure.scores import find_inception, frechet_distance

    if real is None:
        return _NO_REAL
    if min(len(images), len(real)) < 2:
        return f"{len(images)} generated and {len(real)} real images are too few: at least 2 of each"
    value = frechet_distance(real, images, find_inception(settings.inception), settings.device)
    return {"fid": value, "generated": len(images), "real": len(real)}


def _cmmd(images: Sequence[Image], real: RealImages | None, settings: Settings) -> Mapping[str, Any] | str:
    from sdkd.compare.measure.scores import CMMD_MODEL, clip_embeddings, cmmd, find_clip, load_clip

    if real is None:
        return _NO_REAL
    if min(len(images), len(real)) < 2:
        return f"{len(images)} generated and {len(real)} real images are too few: at least 2 of each"
    model, _ = load_clip(find_clip(settings.clip, CMMD_MODEL), settings.device)
    own, other = clip_embeddings(model, images), clip_embeddings(model, real)
    return {
        "cmmd": cmmd(own, other),
        "biased": cmmd(own, other, unbiased=False),
        "model": str(settings.clip or CMMD_MODEL),
        "generated": len(images),
        "real": len(real),
    }
