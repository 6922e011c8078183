"""PSNR against literal values, and how identical images count."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from sdkd.compare.quality import IDENTICAL_DB, ImageLikeness, image_likeness, likeness, psnr_db
from sdkd.errors import InputError


def grey(level: int, size: tuple[int, int] = (4, 4)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


def test_one_level_everywhere_is_48_db() -> None:
    assert psnr_db(grey(100), grey(101)) == pytest.approx(48.1308, abs=1e-4)
    assert psnr_db(grey(0), grey(255)) == pytest.approx(0.0)


def test_identical_images_are_infinitely_close_and_json_gets_none() -> None:
    assert psnr_db(grey(7), grey(7)) == math.inf
    assert image_likeness(grey(7), grey(7)) == ImageLikeness(None, True, 0)


def test_the_largest_difference_does_not_wrap_around_in_uint8() -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0, 0, 0] = 250
    assert image_likeness(Image.fromarray(pixels), grey(0)).max_abs == 250
    assert image_likeness(grey(0), Image.fromarray(pixels)).max_abs == 250


def test_a_likeness_has_the_mean_and_the_worst_image() -> None:
    found = likeness([grey(7), grey(8), grey(11)], [grey(7)] * 3, "eager")
    assert not found.identical
    assert found.reference == "eager"
    assert found.psnr_min_db == pytest.approx(48.1308 - 20 * math.log10(4), abs=1e-4)
    assert found.psnr_mean_db == pytest.approx((IDENTICAL_DB + 48.1308 + 36.0896) / 3, abs=1e-3)
    assert found.max_abs == 4
    assert likeness([grey(1)], [grey(1)], "eager").identical


def test_images_of_different_sizes_are_refused() -> None:
    with pytest.raises(InputError, match=r"images of \(4, 4\) and \(8, 4\) pixels cannot be compared"):
        psnr_db(grey(0), grey(0, (8, 4)))


def test_as_many_images_as_references() -> None:
    with pytest.raises(InputError, match="1 images against 2 references"):
        likeness([grey(0)], [grey(0), grey(0)], "eager")
    with pytest.raises(InputError, match="0 images against 0 references"):
        likeness([], [], "eager")
