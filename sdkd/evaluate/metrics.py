"""Every metric of one model: its values, or why it cannot be measured here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkd.compare.measure.quality import likeness
from sdkd.compare.measure.subjects import TEACHER
from sdkd.core.images import image_size, read_rgb
from sdkd.distill.data.image_folder import images_below
from sdkd.distill.data.reader import check_unreadable
from sdkd.errors import InputError, ModelError
from sdkd.evaluate.report import CAPTIONS, CLIP, CMMD, FID, NOISE, PSNR, Metric
from sdkd.toyworld.reader import CaptionAccuracy, read_image

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image

    from sdkd.evaluate.agreement import Probe
    from sdkd.toyworld.scenes import Scene

Found = Mapping[str, Any] | str
"""Values by name, the headline first; or why there are none."""


class RealImages:
    """All images under a folder, RGB, by name, each read when its turn comes.

    Those that cannot be read are left out and named in `unreadable`; TrainingError when they are more than 1 %, which
    their headers are asked for at once. InputError when the folder holds no images.
    """

    def __init__(self, folder: Path) -> None:
        self.files = images_below(folder)
        self.unreadable: dict[int, str] = {}
        for index, path in enumerate(self.files):
            self._read(index, image_size, path)

    def _read(self, index: int, read: Callable[[Path], Any], path: Path) -> Any:
        try:
            return read(path)
        except InputError as error:
            self.unreadable[index] = str(error)
            check_unreadable(self.unreadable, len(self.files))
            return None

    def __len__(self) -> int:
        return len(self.files) - len(self.unreadable)

    def __iter__(self) -> Iterator[Image]:
        for index, path in enumerate(self.files):
            if index not in self.unreadable and (image := self._read(index, read_rgb, path)) is not None:
                yield image
                del image


@dataclass(frozen=True)
class Reference:
    """What models are held against: the teacher's answers or why there are none, its images, and the real images."""

    probe: Probe | str
    images: Sequence[Image] | None
    real: RealImages | None


@dataclass(frozen=True)
class Drawn:
    """The images of one model, one per prompt; `scenes` are those of the demo, the first `seen` ones seen."""

    images: Sequence[Image]
    prompts: Sequence[str]
    scenes: Sequence[Scene]
    seen: int


def measure(
    pipe: StableDiffusionPipeline, drawn: Drawn, reference: Reference, clip: Path | None, inception: Path | None
) -> dict[str, Metric]:
    """All metrics by name, on the pipeline's device; InputError for a file that was given and cannot be used."""
    device, real = str(pipe.device), reference.real
    return {
        NOISE: _or_why(lambda: _noise(pipe, reference.probe)),
        PSNR: _or_why(lambda: _psnr(drawn.images, reference.images)),
        CAPTIONS: _or_why(lambda: _accuracy(drawn)),
        CLIP: _or_why(lambda: _clip(drawn, clip, device)),
        FID: _or_why(lambda: _distance(drawn.images, real, lambda own, other: _fid(own, other, inception, device))),
        CMMD: _or_why(lambda: _distance(drawn.images, real, lambda own, other: _cmmd(own, other, clip, device))),
    }


def _or_why(measure: Callable[[], Found]) -> Metric:
    """The metric, or why there is none: a message of ours is a reason, anything else a bug."""
    from sdkd.core.perceptual import NotMeasuredError

    try:
        found = measure()
    except (NotMeasuredError, ModelError) as error:
        found = str(error)
    if isinstance(found, str):
        return Metric(not_measured=found)
    metric = Metric(found)
    head = metric.headline
    return metric if head is None or math.isfinite(head) else Metric(not_measured="its value is not finite")


def _noise(pipe: StableDiffusionPipeline, probe: Probe | str) -> Found:
    from sdkd.evaluate.agreement import noise_agreement

    if isinstance(probe, str):
        return probe
    found = noise_agreement(pipe, probe)
    return {"mean": found.mean, "buckets": found.buckets, "edges": probe.edges, "per_image": found.per_image}


def _psnr(images: Sequence[Image], of_teacher: Sequence[Image] | None) -> Found:
    if of_teacher is None:
        return "no teacher is known; give it with --teacher"
    if images[0].size != of_teacher[0].size:
        return f"its images are {images[0].size} pixels, the teacher's {of_teacher[0].size}"
    found = likeness(images, of_teacher, TEACHER)
    return {
        "mean": found.psnr_mean_db,
        "worst": found.psnr_min_db,
        "identical": found.identical,
        "per_image": [one.psnr_db for one in found.per_image],  # null: identical
    }


def _accuracy(drawn: Drawn) -> Found:
    if not drawn.scenes:
        return "only the demo's captions can be judged; ask for them with --data demo and no --prompts"
    scenes, readings = tuple(drawn.scenes), tuple(map(read_image, drawn.images))
    parts = {"seen": slice(None, drawn.seen), "held_out": slice(drawn.seen, None)}
    found = {name: CaptionAccuracy(scenes[part], readings[part]).accuracy for name, part in parts.items()}
    means = {name: sum(one.values()) / len(one) for name, one in found.items()}
    agreed = [reading.agrees(scene) for reading, scene in zip(readings, scenes, strict=True)]
    return {"mean": sum(means.values()) / len(means), **means, "by_attribute": found, "per_image": agreed}


def _clip(drawn: Drawn, folder: Path | None, device: str) -> Found:
    from sdkd.compare.measure.scores import CLIP_SCORE_MODEL, clip_scores, find_clip, load_clip

    scores = clip_scores(*load_clip(find_clip(folder, CLIP_SCORE_MODEL), device), drawn.images, drawn.prompts)
    return {"mean": sum(scores) / len(scores), "model": str(folder or CLIP_SCORE_MODEL), "per_image": scores}


def _distance(
    images: Sequence[Image], real: RealImages | None, distance: Callable[[Sequence[Image], RealImages], dict[str, Any]]
) -> Found:
    """A distance of generated from real images, and how many there were of each."""
    if real is None:
        return "it needs real images; give a folder of them with --real"
    if min(len(images), len(real)) < 2:
        return f"{len(images)} generated and {len(real)} real images are too few: at least 2 of each"
    return distance(images, real) | {"generated": len(images), "real": len(real)}


def _fid(images: Sequence[Image], real: RealImages, inception: Path | None, device: str) -> dict[str, Any]:
    from sdkd.compare.measure.scores import find_inception, frechet_distance

    return {"fid": frechet_distance(real, images, find_inception(inception), device)}


def _cmmd(images: Sequence[Image], real: RealImages, folder: Path | None, device: str) -> dict[str, Any]:
    from sdkd.compare.measure.scores import CMMD_MODEL, clip_embeddings, cmmd, find_clip, load_clip

    model, _ = load_clip(find_clip(folder, CMMD_MODEL), device)
    own, other = clip_embeddings(model, images), clip_embeddings(model, real)
    biased = cmmd(own, other, unbiased=False)
    return {"cmmd": cmmd(own, other), "biased": biased, "model": str(folder or CMMD_MODEL)}
