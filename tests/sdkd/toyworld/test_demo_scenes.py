"""The demo's scenes: words in and out, the held-out set, and drawings that depend on the scene and the seed only."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from sdkd.errors import InputError
from sdkd.toyworld.scenes import (
    COLOURS,
    HELD_OUT_EVERY,
    POSITIONS,
    SHAPES,
    SIZES,
    DemoImages,
    Scene,
    all_scenes,
    caption,
    held_out_scenes,
    is_held_out,
    middle,
    parse_caption,
    render,
    sample_scenes,
    seen_scenes,
)

STAR = Scene("star", "red", "blue", "small", "top left")


def test_number_of_scenes() -> None:
    assert len(all_scenes()) == len(set(all_scenes())) == 8 * 8 * 7 * 3 * 5 == 6720
    assert len({caption(scene) for scene in all_scenes()}) == 6720


def test_every_caption_is_parsed_back_whatever_case_spaces_and_full_stop() -> None:
    assert caption(STAR) == "a small red star on a blue background, at the top left"
    assert caption(Scene("ring", "white", "black")) == "a medium white ring on a black background"
    assert [parse_caption(caption(scene)) for scene in all_scenes()] == list(all_scenes())
    assert parse_caption("  A small RED star on a blue  background, at the top left. ") == STAR


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a photo of a cat", r"'a photo of a cat' is not of the form .*small, medium, large.*crescent.*bottom right"),
        ("a small red dog on a blue background", r"shape 'dog' is unknown: choose one of circle, square"),
        ("a tiny red star on a blue background", r"size 'tiny' is unknown: choose one of small, medium, large"),
        ("a small red star on a pink background", r"background 'pink' is unknown: choose one of red, green"),
        ("a small red star on a red background", r"background 'red' hides a red shape: choose one of green"),
        ("a small red star on a blue background, at the far left", r"position 'far left' is unknown"),
    ],
)
def test_parse_caption_names_the_wrong_word(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_caption(text)


def test_held_out_are_one_combination_in_eleven() -> None:
    combined = {(scene.shape, scene.colour, scene.background) for scene in held_out_scenes()}
    assert len(combined) == 41
    assert len(held_out_scenes()) == 41 * len(SIZES) * len(POSITIONS)
    assert abs(len(held_out_scenes()) / len(all_scenes()) - 1 / HELD_OUT_EVERY) < 0.002
    assert not any(map(is_held_out, seen_scenes()))
    assert set(seen_scenes()) | set(held_out_scenes()) == set(all_scenes())


def test_every_word_is_seen_in_training_and_colours_are_far_apart() -> None:
    for field, words in {"shape": SHAPES, "colour": COLOURS, "background": COLOURS}.items():
        assert {getattr(scene, field) for scene in seen_scenes()} == set(words)
    assert min(np.linalg.norm(np.subtract(a, b)) for a, b in combinations(COLOURS.values(), 2)) > 120


def test_drawing_depends_on_scene_and_seed_only() -> None:
    first, again, other = (np.asarray(render(STAR, seed)) for seed in (1, 1, 2))
    assert first.shape == (64, 64, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("image_size", [64, 128])
def test_drawing_has_both_colours_where_they_belong(image_size: int) -> None:
    for shape in ("circle", "square", "triangle", "star", "cross", "heart", "ring"):
        pixels = np.asarray(render(Scene(shape, "yellow", "black", "large", "bottom right"), 0, image_size))
        x, y = (middle("large", "bottom right") * image_size).astype(int)
        assert pixels.shape == (image_size, image_size, 3)
        assert tuple(pixels[0, 0]) == COLOURS["black"]
        assert tuple(pixels[y, x]) == COLOURS["black" if shape == "ring" else "yellow"]  # a ring has a hole


def test_shapes_stay_inside() -> None:
    for scene in sample_scenes(all_scenes(), 100, 0):
        pixels = np.asarray(render(scene, 5))
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        share = (border == COLOURS[scene.background]).all(1).mean()
        # A large triangle, wider than high, may touch the border with its foot.
        assert share > 0.8 if (scene.shape, scene.size) == ("triangle", "large") else share == 1, scene


def test_sample_scenes_is_repeatable_and_bounded() -> None:
    assert sample_scenes(seen_scenes(), 20, 3) == sample_scenes(seen_scenes(), 20, 3)
    assert len(set(sample_scenes(seen_scenes(), 500, 3))) == 500


def test_dataset_is_repeatable_and_never_held_out() -> None:
    images, again = DemoImages(seed=4), DemoImages(seed=4)
    assert len(images) == len(seen_scenes())
    for index in (0, 17, 6000):
        item = images[index]
        assert (item["image"].size, item["image"].mode) == ((64, 64), "RGB")
        assert item["image"].tobytes() == again[index]["image"].tobytes()
        assert not is_held_out(parse_caption(item["caption"]))
    assert {images.scene(index) for index in range(len(images))} == set(seen_scenes())


def test_dataset_goes_on_with_other_drawings() -> None:
    images = DemoImages(2 * len(seen_scenes()), seed=1)
    later = [index for index in range(len(seen_scenes()), len(images)) if images.scene(index) == images.scene(0)]
    assert len(later) == 1
    assert images[0]["caption"] == images[later[0]]["caption"]
    assert images[0]["image"].tobytes() != images[later[0]]["image"].tobytes()


def test_dataset_of_held_out_scenes_and_bounds() -> None:
    images = DemoImages(10, held_out=True)
    assert all(is_held_out(images.scene(index)) for index in range(10))
    with pytest.raises(IndexError, match=r"index 10 is not in 0\.\.9"):
        images[10]
    with pytest.raises(InputError, match="count 0 is not a number of images"):
        DemoImages(0)
    with pytest.raises(InputError, match="count 7000 is not between 1 and 6720"):
        sample_scenes(all_scenes(), 7000, 0)
    with pytest.raises(InputError, match="image size 8 is too small"):
        render(STAR, 0, 8)
