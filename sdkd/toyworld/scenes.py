"""The demo's world: one coloured shape on a coloured background, drawn by rule and captioned in words.

8 shapes x 8 colours x 7 other colours behind x 3 sizes x 5 positions = 6,720 captions. One combination of shape, colour
and background in 11 is held out of all training, so that a model can be asked for what it never saw.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sdkd.errors import InputError, an

# Corners of the RGB cube, softened: no two are closer than 120 of 255 in every mixture that a blurred edge makes.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 45),
    "green": (40, 165, 70),
    "blue": (45, 70, 215),
    "yellow": (245, 215, 50),
    "magenta": (225, 60, 215),
    "cyan": (50, 205, 225),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
# Half the height of a shape as a share of the image.
SIZES: dict[str, float] = {"small": 10 / 64, "medium": 15 / 64, "large": 20 / 64}
# Direction from the middle of the image: x to the right, y downwards.
POSITIONS: dict[str, tuple[int, int]] = {
    "middle": (0, 0),
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
}
HELD_OUT_EVERY = 11
IMAGE_SIZE = 64

_MARGIN = 3 / 64  # a shape stays this far from the border, as a share of the image
_REACH = 0.8  # a corner position goes this far of the free way towards the corner
_OVERSAMPLING = 4
_JITTER_ANGLE, _JITTER_SIZE, _JITTER_PLACE = 10.0, 0.04, 1.5 / 64  # degrees, share of the size, share of the image
_CAPTION = re.compile(r"an? (\w+) (\w+) (\w+) on an? (\w+) background(?:, at the (\w+ \w+))?")

Points = NDArray[np.float64]


def _polygon(angles: Points, radii: Points) -> Points:
    """Corners [n, 2] from angles in turns (0 is up, clockwise) and radii."""
    return np.stack([radii * np.sin(math.tau * angles), -radii * np.cos(math.tau * angles)], axis=1)


def _regular(count: int, radius: float = 1.0, turn: float = 0.0) -> Points:
    return _polygon(np.arange(count) / count + turn, np.full(count, radius))


def _moved(points: Points, x: float = 0.0, y: float = 0.0) -> Points:
    return points + np.array([x, y])


def _star() -> Points:
    return _moved(_polygon(np.arange(10) / 10, np.tile([1.15, 0.48], 5)), y=0.08)


def _cross() -> Points:
    arm = 0.32
    quarter = np.array([[arm, -1], [arm, -arm], [1, -arm]])
    turn = np.array([[0, 1], [-1, 0]])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, number) for number in range(4)])


def _heart() -> Points:
    t = math.tau * np.arange(64) / 64
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2.5], axis=1) / 15.5


# Each shape: polygons in units of its half height, painted one after the other; True paints the shape's colour, False
# the background's (a hole).
_OUTLINES: dict[str, tuple[tuple[Points, bool], ...]] = {
    "circle": ((_regular(64), True),),
    "square": ((_regular(4, 1.3, 1 / 8), True),),
    "triangle": ((_moved(_regular(3, 1.3), y=0.3), True),),
    "star": ((_star(), True),),
    "ring": ((_regular(64), True), (_regular(64, 0.55), False)),
    "cross": ((_cross(), True),),
    "heart": ((_heart(), True),),
    "crescent": ((_moved(_regular(64), x=0.1), True), (_moved(_regular(64, 0.85), x=0.6), False)),
}
SHAPES: tuple[str, ...] = tuple(_OUTLINES)


@dataclass(frozen=True)
class Scene:
    """What an image shows; every field is one of the words of this module (InputError otherwise)."""

    shape: str
    colour: str
    background: str
    size: str = "medium"
    position: str = "middle"

    def __post_init__(self) -> None:
        choices = {"shape": SHAPES, "colour": COLOURS, "background": COLOURS, "size": SIZES, "position": POSITIONS}
        for field, words in choices.items():
            if getattr(self, field) not in words:
                raise InputError(f"{field} {getattr(self, field)!r} is unknown: choose one of {', '.join(words)}")
        if self.colour == self.background:
            others = ", ".join(word for word in COLOURS if word != self.colour)
            raise InputError(f"background {self.background!r} hides {an(self.colour)} shape: choose one of {others}")


def caption(scene: Scene) -> str:
    """The words for a scene, such as "a small red star on a blue background, at the top left"."""
    suffix = "" if scene.position == "middle" else f", at the {scene.position}"
    return f"a {scene.size} {scene.colour} {scene.shape} on a {scene.background} background{suffix}"


def parse_caption(text: str) -> Scene:
    """The scene that a caption describes; InputError (a ValueError) for any other text."""
    match = _CAPTION.fullmatch(" ".join(text.lower().split()).rstrip("."))
    if match is None:
        raise InputError(
            f"caption {text!r} is not of the form 'a SIZE COLOUR SHAPE on a COLOUR background[, at the POSITION]': "
            f"SIZE is one of {', '.join(SIZES)}; COLOUR of {', '.join(COLOURS)}; SHAPE of {', '.join(SHAPES)}; "
            f"POSITION of {', '.join(list(POSITIONS)[1:])}"
        )
    size, colour, shape, background, position = match.groups()
    return Scene(shape, colour, background, size, position or "middle")


@cache
def all_scenes() -> tuple[Scene, ...]:
    """Every scene, in a fixed order."""
    return tuple(
        Scene(shape, colour, background, size, position)
        for shape in SHAPES
        for colour in COLOURS
        for background in COLOURS
        if background != colour
        for size in SIZES
        for position in POSITIONS
    )


def is_held_out(scene: Scene) -> bool:
    """Whether the combination of shape, colour and background is kept out of training (its sizes and positions too)."""
    colours = list(COLOURS)
    colour, background = colours.index(scene.colour), colours.index(scene.background)
    place = background - (background > colour)
    combination = (SHAPES.index(scene.shape) * len(colours) + colour) * (len(colours) - 1) + place
    return combination % HELD_OUT_EVERY == HELD_OUT_EVERY // 2


@cache
def seen_scenes() -> tuple[Scene, ...]:
    """The scenes that may be trained on."""
    return tuple(scene for scene in all_scenes() if not is_held_out(scene))


@cache
def held_out_scenes() -> tuple[Scene, ...]:
    """The scenes that nothing is ever trained on."""
    return tuple(scene for scene in all_scenes() if is_held_out(scene))


def sample_scenes(scenes: tuple[Scene, ...], count: int, seed: int) -> list[Scene]:
    """`count` different scenes of `scenes`, the same for the same seed; InputError when there are not so many."""
    if not 0 < count <= len(scenes):
        raise InputError(f"count {count} is not between 1 and {len(scenes)}, the number of scenes to choose from")
    return [scenes[index] for index in np.random.default_rng(seed).permutation(len(scenes))[:count]]


def _jitter(scene: Scene, seed: int) -> Callable[[float], float]:
    """A source of uniform numbers in [-limit, limit] that depends on the scene and the seed only."""
    rng = np.random.default_rng([seed, *caption(scene).encode()])
    return lambda limit: float(rng.uniform(-limit, limit))


def middle(size: str, position: str) -> Points:
    """Where the middle of a shape goes before jitter: x and y as shares of the image, float64 [2]."""
    free = 0.5 - _MARGIN - SIZES[size]
    return 0.5 + _REACH * free * np.array(POSITIONS[position], dtype=np.float64)


def outline(
    shape: str, angle: float, radius: float, centre: Points
) -> Iterator[tuple[list[tuple[float, float]], bool]]:
    """The polygons of a shape turned clockwise by `angle` degrees, in pixels, each with True for paint, False: hole."""
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    turn = np.array([[cosine, -sine], [sine, cosine]])
    for points, painted in _OUTLINES[shape]:
        placed = points @ turn.T * radius + centre
        yield [(float(x), float(y)) for x, y in placed], painted


def render(scene: Scene, seed: int, image_size: int = IMAGE_SIZE) -> Image.Image:
    """Draw a scene as an RGB image of `image_size` pixels squared; angle, size and place vary a little with `seed`."""
    if image_size < 16:
        raise InputError(f"image size {image_size} is too small to tell the shapes apart: use 16 or more")
    jitter = _jitter(scene, seed)
    side = image_size * _OVERSAMPLING
    angle, radius = jitter(_JITTER_ANGLE), SIZES[scene.size] * (1 + jitter(_JITTER_SIZE)) * side
    shift = np.array([jitter(_JITTER_PLACE), jitter(_JITTER_PLACE)])
    centre = (middle(scene.size, scene.position) + shift) * side
    image = Image.new("RGB", (side, side), COLOURS[scene.background])
    draw = ImageDraw.Draw(image)
    for polygon, painted in outline(scene.shape, angle, radius, centre):
        draw.polygon(polygon, fill=COLOURS[scene.colour if painted else scene.background])
    return image.reduce(_OVERSAMPLING)


@lru_cache(maxsize=4)
def _order(seed: int, turn: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, turn]).permutation(count)


class DemoImages:
    """Items {"image": PIL image, "caption": str}, drawn when asked for, the same for the same seed and index.

    Every pass over the scenes comes in another order and with other drawings; `held_out` gives the scenes that are
    never trained on in place of those that may be.
    """

    def __init__(self, count: int | None = None, seed: int = 0, *, held_out: bool = False) -> None:
        self.scenes = held_out_scenes() if held_out else seen_scenes()
        self.count = len(self.scenes) if count is None else count
        if self.count < 1:
            raise InputError(f"count {count} is not a number of images: use 1 or more")
        self.seed = seed

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> Scene:
        """The scene at an index; IndexError outside 0..len-1."""
        if not 0 <= index < self.count:
            raise IndexError(f"index {index} is not in 0..{self.count - 1}")
        turn, place = divmod(index, len(self.scenes))
        return self.scenes[int(_order(self.seed, turn, len(self.scenes))[place])]

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        scene = self.scene(index)
        return {"image": render(scene, self.seed * 1_000_003 + index), "caption": caption(scene)}
