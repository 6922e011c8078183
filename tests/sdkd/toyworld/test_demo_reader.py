"""The reader: what it names in drawings, in damaged drawings, and in pictures that show nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sdkd.errors import InputError
from sdkd.toyworld.reader import ATTRIBUTES, UNCLEAR, read_image
from sdkd.toyworld.scenes import SHAPES, Scene, all_scenes, render, sample_scenes

UNSEEN = 123_456  # a seed of drawings that no template was made from


def shares(
    count: int, seed: int, damage: Callable[[Image.Image], Image.Image] = lambda image: image
) -> dict[str, float]:
    scenes = sample_scenes(all_scenes(), count, seed)
    agreed = [read_image(damage(render(scene, UNSEEN))).agrees(scene) for scene in scenes]
    return {name: sum(one[name] for one in agreed) / count for name in ATTRIBUTES}


def blurred_and_noisy(image: Image.Image) -> Image.Image:
    """Worse than what the demo's VAE does to an image."""
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1.2)), np.float64)
    noise = np.random.default_rng(int(pixels.sum())).normal(0, 10, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def test_names_drawings_also_blurred_noisy_and_of_another_size() -> None:
    for least, right in (
        (0.995, shares(200, seed=0)),
        (0.98, shares(100, seed=1, damage=blurred_and_noisy)),
        (0.98, shares(50, seed=2, damage=lambda image: image.resize((32, 32), Image.Resampling.BICUBIC))),
        (0.98, shares(50, seed=2, damage=lambda image: image.resize((128, 128), Image.Resampling.BICUBIC))),
    ):
        assert min(right.values()) >= least, right


def test_score_is_high_for_a_drawing() -> None:
    for shape in SHAPES:
        scene = Scene(shape, "white", "green", "medium", "bottom left")
        reading = read_image(render(scene, UNSEEN))
        assert all(reading.agrees(scene).values())
        assert 0.85 < reading.score <= 1


def test_agrees_attribute_by_attribute() -> None:
    reading = read_image(render(Scene("star", "red", "blue", "small"), 0))
    other = Scene("star", "green", "blue", "large")
    expected = {"shape": True, "colour": False, "background": True, "size": False, "position": True}
    assert reading.agrees(other) == expected


def test_what_shows_no_shape() -> None:
    reading = read_image(Image.new("RGB", (64, 64), (215, 40, 45)))
    assert (reading.background, reading.colour, reading.shape, reading.score) == ("red", UNCLEAR, UNCLEAR, 0.0)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    two = Image.new("RGB", (64, 64), (20, 20, 20))
    for corner in ((4, 4, 20, 20), (44, 44, 60, 60)):
        two.paste((245, 245, 245), corner)
    assert read_image(Image.fromarray(noise)).shape == read_image(two).shape == UNCLEAR


def test_too_small_an_image_is_refused() -> None:
    with pytest.raises(InputError, match="image of 8x64 pixels is too small to read"):
        read_image(Image.new("RGB", (8, 64)))
