"""Reads a picture back: which shape, colours, size and place it shows, and how often that is what its caption says.

Numpy only, no learnt part.

The border gives the background, the pixels farthest from it the colour; their mixture gives a soft mask, which is
shifted, scaled to unit area and compared (soft intersection over union) with every shape at several angles and sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from sdkd.errors import InputError
from sdkd.toyworld.scenes import (
    COLOURS,
    IMAGE_SIZE,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    caption,
    middle,
    outline,
    parse_caption,
)

ATTRIBUTES = ("shape", "colour", "background", "size", "position")
UNCLEAR = "unclear"
LEAST_PX = 16

_ANGLES = range(-16, 17, 4)  # degrees; drawings turn by up to 10
_GRID = 24  # samples across the normalised mask
_REACH = 1.25  # half the width of that grid, in units of the square root of the shape's area
_CLEAR = 0.72  # a soft intersection over union below this is no shape: drawings reach 0.9
_CONTRAST = 60.0  # an image without two colours at least this far apart (0..441) shows nothing

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """What an image shows, in the words of `scenes` or "unclear"; `score` (0 to 1) is how well the shape fits."""

    shape: str
    colour: str
    background: str
    size: str
    position: str
    score: float

    def agrees(self, scene: Scene) -> dict[str, bool]:
        """Attribute -> whether it is read as the scene has it."""
        return {name: getattr(self, name) == getattr(scene, name) for name in ATTRIBUTES}


@dataclass(frozen=True)
class _Template:
    shape: str
    size: str
    area: float  # of the image
    shift: Floats  # centre of mass minus the middle of the outline, x and y as shares of the image


def _nearest(colour: Floats, but: str = "") -> str:
    """The named colour with the least squared distance to an RGB value."""
    names = [name for name in COLOURS if name != but]
    return min(names, key=lambda name: float(np.square(colour - COLOURS[name]).sum()))


def _moments(mask: Floats) -> tuple[float, Floats]:
    """Area and centre of mass (x, y) of a soft mask [side, side], in shares of the image."""
    side = len(mask)
    place = (np.arange(side) + 0.5) / side
    total = mask.sum()
    return float(total / side**2), np.array([mask.sum(0) @ place, mask.sum(1) @ place]) / total


def _normalised(mask: Floats) -> Floats:
    """The mask sampled bilinearly on a grid around its centre of mass, scaled by its area: float [_GRID ** 2]."""
    area, (x, y) = _moments(mask)
    side = len(mask)
    steps = np.linspace(-_REACH, _REACH, _GRID) * np.sqrt(area)
    columns, rows = _weights((x + steps) * side - 0.5, side), _weights((y + steps) * side - 0.5, side)
    return np.asarray(rows @ mask @ columns.T).ravel()


def _weights(places: Floats, side: int) -> Floats:
    """Matrix [len(places), side] of linear interpolation between pixels; nothing outside the image."""
    return np.clip(1 - np.abs(places[:, None] - np.arange(side)[None]), 0, None)


def _shape_mask(shape: str, size: str, angle: float) -> Floats:
    """The mask of a shape in the middle of an image, slightly blurred: float [64, 64] of 0..1."""
    scale = 4  # drawn larger, then reduced
    side = IMAGE_SIZE * scale
    image = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(image)
    for polygon, painted in outline(shape, angle, SIZES[size] * side, np.full(2, side / 2)):
        draw.polygon(polygon, fill=255 * painted)
    return np.asarray(image.filter(ImageFilter.GaussianBlur(0.6 * scale)).reduce(scale), np.float64) / 255


@cache
def _templates() -> tuple[tuple[_Template, ...], Floats]:
    """Every shape at every size and angle, and their normalised masks [n, _GRID ** 2]."""
    templates, masks = [], []
    for shape in SHAPES:
        for size in SIZES:
            for angle in _ANGLES:
                mask = _shape_mask(shape, size, angle)
                area, centre = _moments(mask)
                templates.append(_Template(shape, size, area, centre - 0.5))
                masks.append(_normalised(mask))
    return tuple(templates), np.stack(masks)


def _overlap(mask: Floats, others: Floats) -> Floats:
    """Soft intersection over union of one normalised mask [n] with many [m, n]: [m]."""
    return np.asarray(np.minimum(mask, others).sum(1) / np.maximum(mask, others).sum(1))


def _colours(pixels: Floats) -> tuple[Floats, Floats]:
    """RGB of the background (median of the border) and of the shape (median of the pixels farthest from it)."""
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), *pixels[:, [0, 1, -2, -1]]])
    background = np.median(border, axis=0)
    distance = np.sqrt(np.square(pixels - background).sum(-1))
    far = np.quantile(distance, 1 - 24 / distance.size)
    return background, np.median(pixels[distance >= 0.8 * far], axis=0)


def _size(template: _Template, area: float) -> str:
    """The size whose area, for this shape, is nearest by ratio."""
    radius = np.sqrt(area / template.area) * SIZES[template.size]
    return min(SIZES, key=lambda size: abs(float(np.log(radius / SIZES[size]))))


def read_image(image: Image.Image) -> Reading:
    """Name what an RGB image of any size shows; never fails on a picture, but says "unclear"."""
    width, height = image.size
    if min(image.size) < LEAST_PX:
        raise InputError(f"image of {width}x{height} pixels is too small to read: {LEAST_PX} or more are needed")
    small = image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    pixels = np.asarray(small, np.float64)
    background, colour = _colours(pixels)
    words = {"background": _nearest(background), "colour": UNCLEAR, "shape": UNCLEAR, "size": UNCLEAR}
    along = colour - background
    contrast = float(along @ along)
    if contrast < _CONTRAST**2:
        return Reading(**words, position=UNCLEAR, score=0.0)
    words["colour"] = _nearest(colour, but=words["background"])
    # Noise of a decoder around both colours is cut off: below 15 % is background, above 85 % is shape.
    mask = np.clip(((pixels - background) @ along / contrast - 0.15) / 0.7, 0, 1)
    templates, masks = _templates()
    scores = _overlap(_normalised(mask), masks)
    best, score = templates[int(scores.argmax())], float(scores.max())
    area, centre = _moments(mask)
    words["size"] = _size(best, area)
    shift = best.shift * SIZES[words["size"]] / SIZES[best.size]
    places = {place: middle(words["size"], place) for place in POSITIONS}
    position = min(places, key=lambda place: float(np.abs(centre - shift - places[place]).max()))
    words["shape"] = best.shape if score >= _CLEAR else UNCLEAR
    return Reading(**words, position=position, score=score)


@dataclass(frozen=True)
class CaptionAccuracy:
    """Shares (0 to 1) of images that show each attribute as asked, and what was read in each image."""

    scenes: tuple[Scene, ...]
    readings: tuple[Reading, ...]

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.scenes)

    @property
    def right(self) -> dict[str, int]:
        """Attribute -> number of images that show it as asked."""
        agreed = [reading.agrees(scene) for scene, reading in zip(self.scenes, self.readings, strict=True)]
        return {name: sum(one[name] for one in agreed) for name in ATTRIBUTES}

    @property
    def accuracy(self) -> dict[str, float]:
        """Attribute -> share of images that show it as asked."""
        return {name: right / self.count for name, right in self.right.items()}


def draw(
    pipe: Any, scenes: Sequence[Scene], steps: int, guidance_scale: float, seed: int, batch_size: int
) -> list[Image.Image]:
    """One image per scene; noise comes from the seed and the place in the list, whatever the batch size."""
    import torch

    images: list[Image.Image] = []
    for start in range(0, len(scenes), batch_size):
        batch = scenes[start : start + batch_size]
        images += pipe(
            [caption(scene) for scene in batch],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed + start + place) for place in range(len(batch))],
        ).images
    return images


def evaluate_captions(
    pipe: Any,
    scenes: Sequence[Scene],
    steps: int = 25,
    guidance_scale: float = 4.0,
    seed: int = 0,
    batch_size: int = 32,
) -> CaptionAccuracy:
    """Draw every scene's caption with a Stable Diffusion pipeline and read the images; InputError without scenes."""
    if not scenes or batch_size < 1:
        raise InputError(f"{len(scenes)} scenes in batches of {batch_size}: both numbers must be 1 or more")
    images = draw(pipe, scenes, steps, guidance_scale, seed, batch_size)
    return CaptionAccuracy(tuple(scenes), tuple(read_image(image) for image in images))


JUDGED = ("shape", "colour", "background")  # size and position have hardly been learnt by the embedded teacher


def judge_captions(images: Sequence[Image.Image], captions: Sequence[str]) -> dict[str, float]:
    """Attribute of JUDGED -> share of images that show it as their caption says; InputError for other captions."""
    found = CaptionAccuracy(tuple(map(parse_caption, captions)), tuple(map(read_image, images)))
    return {name: found.accuracy[name] for name in JUDGED}


def are_captions(texts: Sequence[str]) -> bool:
    """Whether all texts are captions of the demo's world, so that the reader can judge their images."""
    try:
        return bool([parse_caption(text) for text in texts])
    except InputError:
        return False
