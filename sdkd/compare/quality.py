"""How far images are from other images of the same prompt and seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sdkd.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

# What an identical image counts in a mean: one grey level in one channel of one 512x512 pixel is 107 dB, of one
# 64x64 pixel 89 dB.
IDENTICAL_DB = 100.0


@dataclass(frozen=True)
class ImageLikeness:
    """One image against its reference: PSNR in dB (None when identical) and the largest difference in grey levels."""

    psnr_db: float | None
    identical: bool
    max_abs: int

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
    def max_abs(self) -> int:
        """Largest difference of any pixel, in grey levels of 255."""
        return max(image.max_abs for image in self.per_image)


def _pixels(image: Image) -> np.ndarray[tuple[int, ...], np.dtype[np.int16]]:
    return np.asarray(image.convert("RGB"), dtype=np.uint8).astype(np.int16)


def image_likeness(image: Image, reference: Image) -> ImageLikeness:
    """PSNR over the uint8 RGB pixels of two images of equal size, peak 255; InputError when sizes differ."""
    if image.size != reference.size:
        raise InputError(f"images of {image.size} and {reference.size} pixels cannot be compared: use one size")
    difference = _pixels(image) - _pixels(reference)
    error = float(np.mean(np.square(difference, dtype=np.int64)))
    if error == 0:
        return ImageLikeness(None, True, 0)
    return ImageLikeness(10 * math.log10(255**2 / error), False, int(np.abs(difference).max()))


def psnr_db(image: Image, reference: Image) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 images; infinity when identical."""
    found = image_likeness(image, reference)
    return math.inf if found.psnr_db is None else found.psnr_db


def likeness(images: Sequence[Image], references: Sequence[Image], reference: str) -> Likeness:
    """Compare images pairwise with the references of the subject labelled `reference`."""
    if len(images) != len(references) or not images:
        raise InputError(f"{len(images)} images against {len(references)} references: give as many of each, at least 1")
    return Likeness(reference, tuple(map(image_likeness, images, references)))
