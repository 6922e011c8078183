"""Which optimization profile a call takes, and how many images at once."""

from __future__ import annotations

import pytest

from engines.sessions.profiles import Profiles
from sdkd.core.profiles import Range


def unet(batch: int, low: int, high: int) -> dict[str, Range]:
    """A UNet's profile: 1 to `batch` latents, `low` to `high` on a side."""
    side = Range(low, low, high)
    return {"batch": Range(1, 1, batch), "height": side, "width": side, "sequence": Range.fixed(77)}


def sizes(batch: int, height: int, width: int) -> dict[str, int]:
    return {"batch": batch, "height": height, "width": width, "sequence": 77}


@pytest.mark.parametrize(
    ("asked", "profile"), [((2, 16, 16), 1), ((2, 32, 48), 0), ((8, 16, 16), 0), ((9, 16, 16), None), ((2, 8, 8), None)]
)
def test_the_smallest_profile_that_fits_is_picked(asked: tuple[int, int, int], profile: int | None) -> None:
    assert Profiles([unet(8, 16, 64), unet(2, 16, 32)]).pick(sizes(*asked)) == profile


def test_text_does_not_decide_between_profiles() -> None:
    many, large = (unet(6, 64, 64), unet(2, 64, 128))  # more latents, less text
    assert Profiles([many, large]).pick(sizes(2, 64, 64)) == 0
    assert Profiles([large, many]).pick(sizes(2, 64, 64)) == 1
    assert Profiles([many, large]).pick(sizes(2, 64, 72)) == 1
    texts = [{"batch": Range(1, 1, most), "sequence": Range.fixed(77)} for most in (8, 2)]
    assert Profiles(texts).pick({"batch": 1, "sequence": 77}) == 1
    assert Profiles([{}]).pick({}) == 0  # fixed shapes


def test_the_largest_batch_is_that_of_profiles_of_the_other_sizes() -> None:
    profiles = Profiles([unet(8, 8, 16), unet(2, 8, 32)])
    assert profiles.largest_batch(sizes(1, 16, 16)) == 8
    assert profiles.largest_batch(sizes(1, 32, 32)) == 2
    assert profiles.largest_batch(sizes(9, 32, 16)) == 2
    assert profiles.largest_batch(sizes(1, 64, 64)) is None
