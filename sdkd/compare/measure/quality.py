"""How far images are from other images of the same prompt and seed, and the rules that engine images must keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sdkd.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from sdkd.bundle.quantized import Quantized
    from sdkd.compare.measure.subjects import Subject

Perceptual = Callable[["Image", "Image"], float | None]
"""A distance of an image to its reference, such as LPIPS: 0 when they are equal, None when they are too small."""

# What an identical image counts in a mean: one grey level in one channel of one 512x512 pixel is 107 dB, of one
# 64x64 pixel 89 dB.
IDENTICAL_DB = 100.0
FP32_LEAST_DB = 40.0
HALF_MARGIN_DB = 1.0
OTHER_IMAGE_DB = 15.0  # of mean PSNR; below, an engine draws other images, whatever its build accepted
SSIM_SIGMA, SSIM_RADIUS = 1.5, 5  # the Gaussian window of 11 pixels
SSIM_C1, SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


@dataclass(frozen=True)
class ImageLikeness:
    """One image against its reference: PSNR in dB (None when identical) and the largest difference in grey levels.

    `ssim`: at most 1, which an identical image has; `lpips`: None where it was not measured.
    """

    psnr_db: float | None
    identical: bool
    max_abs: int
    ssim: float = 1.0
    lpips: float | None = None

    @property
    def counted_db(self) -> float:
        """PSNR for means and minima: at most IDENTICAL_DB, which is what an identical image counts."""
        return IDENTICAL_DB if self.psnr_db is None else min(self.psnr_db, IDENTICAL_DB)


@dataclass(frozen=True)
class Likeness:
    """Images against their references, prompt by prompt; `reference` is the label of what they were compared with."""

    reference: str
    per_image: tuple[ImageLikeness, ...]

    @property
    def identical(self) -> bool:
        """Whether every image equals its reference."""
        return all(image.identical for image in self.per_image)

    @property
    def psnr_mean_db(self) -> float:
        """Mean over prompts; an identical image counts as IDENTICAL_DB."""
        return sum(image.counted_db for image in self.per_image) / len(self.per_image)

    @property
    def psnr_min_db(self) -> float:
        """The worst image."""
        return min(image.counted_db for image in self.per_image)

    @property
    def worst(self) -> int:
        """Number of the image that is furthest from its reference by PSNR; the first of several."""
        return min(range(len(self.per_image)), key=lambda number: self.per_image[number].counted_db)

    @property
    def ssim_mean(self) -> float:
        """Mean over prompts."""
        return sum(image.ssim for image in self.per_image) / len(self.per_image)

    @property
    def ssim_min(self) -> float:
        """The worst image by SSIM."""
        return min(image.ssim for image in self.per_image)

    @property
    def lpips_mean(self) -> float | None:
        """Mean over prompts; None where it was not measured."""
        found = [image.lpips for image in self.per_image if image.lpips is not None]
        return sum(found) / len(found) if found else None

    @property
    def lpips_max(self) -> float | None:
        """The worst image by LPIPS; None where it was not measured."""
        return max((image.lpips for image in self.per_image if image.lpips is not None), default=None)

    @property
    def max_abs(self) -> int:
        """Largest difference of any pixel, in grey levels of 255."""
        return max(image.max_abs for image in self.per_image)


def pixels(image: Image) -> NDArray[np.int16]:
    """RGB [height, width, 3] of 0 to 255, signed, so that differences do not wrap around."""
    return np.asarray(image.convert("RGB"), dtype=np.uint8).astype(np.int16)


def image_likeness(image: Image, reference: Image, perceptual: Perceptual | None = None) -> ImageLikeness:
    """PSNR over the uint8 RGB pixels of two images of equal size, peak 255, and SSIM; InputError when sizes differ."""
    if image.size != reference.size:
        raise InputError(f"images of {image.size} and {reference.size} pixels cannot be compared: use one size")
    own, other = pixels(image), pixels(reference)
    difference = own - other
    error = float(np.mean(np.square(difference, dtype=np.int64)))
    lpips = None if perceptual is None else 0.0 if error == 0 else perceptual(image, reference)
    if error == 0:
        return ImageLikeness(None, True, 0, 1.0, lpips)
    return ImageLikeness(10 * math.log10(255**2 / error), False, int(np.abs(difference).max()), ssim(own, other), lpips)


def ssim(image: NDArray[np.int16], reference: NDArray[np.int16]) -> float:
    """Structural similarity of two RGB images [height, width, 3] of 0 to 255 (Wang et al. 2004, equation 13).

    Mean over channels and over the places where the whole Gaussian window (11 pixels, sigma 1.5) lies inside the
    image; over all places, with the image mirrored at its edges, where it is smaller than the window.
    """
    from scipy.ndimage import gaussian_filter

    def blur(values: NDArray[np.float64]) -> NDArray[np.float64]:
        result: NDArray[np.float64] = gaussian_filter(values, SSIM_SIGMA, radius=SSIM_RADIUS, axes=(0, 1))
        return result

    x, y = image.astype(np.float64), reference.astype(np.float64)
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    means = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    found = means * (2 * cov + SSIM_C2) / (var_x + var_y + SSIM_C2)
    edge = SSIM_RADIUS if min(found.shape[:2]) > 2 * SSIM_RADIUS else 0
    return float(found[edge : found.shape[0] - edge, edge : found.shape[1] - edge].mean())


def difference_image(image: Image, reference: Image, largest_px: int | None = None) -> Image:
    """The absolute difference of two images of equal size, channel by channel, not amplified.

    Where a side is longer than `largest_px`, each pixel of the smaller image is the largest difference below it.
    """
    from PIL.Image import fromarray

    found = np.abs(pixels(image) - pixels(reference)).astype(np.uint8)
    block = 1 if largest_px is None else math.ceil(max(found.shape[:2]) / largest_px)
    if block > 1:
        high, wide = (math.ceil(side / block) * block for side in found.shape[:2])
        padded = np.zeros((high, wide, 3), np.uint8)
        padded[: found.shape[0], : found.shape[1]] = found
        found = padded.reshape(high // block, block, wide // block, block, 3).max(axis=(1, 3))
    return fromarray(found)


def likeness(
    images: Sequence[Image], references: Sequence[Image], reference: str, perceptual: Perceptual | None = None
) -> Likeness:
    """Compare images pairwise with the references of the subject labelled `reference`."""
    if len(images) != len(references) or not images:
        raise InputError(f"{len(images)} images against {len(references)} references: give as many of each, at least 1")
    pairs = zip(images, references, strict=True)
    return Likeness(reference, tuple(image_likeness(*pair, perceptual) for pair in pairs))


@dataclass(frozen=True)
class Verdict:
    """Whether a rule holds (None: could not be judged), the rule, and what was found.

    `further`: an engine of eight bits is further from float32 than half precision, as its build accepted: that is what
    it was asked for, so that `ok` is None, and no command fails for it.
    """

    ok: bool | None
    rule: str
    found: str
    further: bool = False


def judge_engine(
    subject: Subject, against_eager: Likeness | None, eager_half: Likeness | None, rounding: Quantized | None = None
) -> Verdict | None:
    """The verdict on an engine; None for an eager subject, which is the measure itself.

    `eager_half`: eager in the half precision that the engine is judged in, against the same float32 images. All of them
    cache steps as the engine does. `rounding`: what the build of an engine in eight bits recorded.
    """
    if subject.is_eager:
        return None
    found, precision = against_eager, subject.judged_in
    cached = f", all with cache interval {subject.cache_interval}" if subject.caches else ""
    if precision == "fp32":
        rule = f"every image is at least {FP32_LEAST_DB:.0f} dB PSNR from eager fp32{cached}"
        if found is None:
            return Verdict(None, rule, "no eager images to compare with")
        return Verdict(found.psnr_min_db >= FP32_LEAST_DB, rule, f"worst image {_db(found, worst=True)}")
    rule = f"no further from eager fp32 than eager {precision} is, within {HALF_MARGIN_DB:.0f} dB of mean PSNR{cached}"
    if subject.is_quantized:
        rule += f"; further only as its own build accepted it, and never below {OTHER_IMAGE_DB:.0f} dB"
    if found is None or eager_half is None:
        return Verdict(None, rule, f"no eager {'fp32' if found is None else precision} images to compare with")
    ok = found.psnr_mean_db >= eager_half.psnr_mean_db - HALF_MARGIN_DB
    if subject.is_quantized:
        figures = f"{_db(found)}, {precision} {_db(eager_half)}"
        if ok:
            return Verdict(True, rule, f"as close as {precision}: {figures}")
        return _further(rule, found, figures, rounding)
    return Verdict(ok, rule, f"{_db(found)}, eager {precision} {_db(eager_half)}")


def _further(rule: str, found: Likeness, figures: str, rounding: Quantized | None) -> Verdict:
    """The verdict on an engine in eight bits that is further than half precision: its build had a gate of its own."""
    if found.psnr_mean_db < OTHER_IMAGE_DB:
        return Verdict(False, rule, f"another image: {figures}")
    if rounding is None or not rounding.quality.kept:
        return Verdict(False, rule, f"further: {figures}, and its build did not find it good enough")
    return Verdict(None, rule, f"further: {figures}", further=True)


def _db(found: Likeness, worst: bool = False) -> str:
    return "identical" if found.identical else f"{found.psnr_min_db if worst else found.psnr_mean_db:.1f} dB"
