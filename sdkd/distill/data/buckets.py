"""Aspect buckets: image sizes of nearly the same area, so that a tall image need not lose its top and bottom.

As in NovelAI's and kohya's trainers: sides are multiples of 64 pixels, no bucket has more pixels than the square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sdkd.core.images import name_of, to_rgb
from sdkd.errors import InputError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

STEP = 64  # pixels; what a UNet of four levels on a VAE with 8 pixels per latent can halve
SLIMMEST = 64  # longer to shorter side of images that are taken at all
_WASTE = 4  # times the pixels that are kept
RATIO = 2.0  # of the longer to the shorter side, at most

Crop = Literal["center", "random"]
CROPS: tuple[Crop, ...] = ("center", "random")
Sizes = tuple[int, int, int, int, int, int]
"""What SDXL is told of a view, in pixels: height and width of the whole image, top and left of what was cut of it once
it was resized, height and width of that (arXiv 2307.01952, 2.2; in the order of diffusers' `time_ids`)."""


class View(NamedTuple):
    """What is learnt of an image: float32 pixels [3, height, width] in [-1, 1], and what they were cut of."""

    pixels: torch.Tensor
    sizes: Sizes


def aspect_buckets(resolution: int, step: int = STEP) -> list[tuple[int, int]]:
    """Sizes (height, width) in pixels, from tall to wide: multiples of `step`, at most resolution^2 pixels each.

    Each is the largest of its width or height. InputError when not even one square of `step` pixels fits.
    """
    if resolution < step or step < 1:
        raise InputError(f"resolution {resolution} is too small for buckets: give {step} pixels or more")
    square = resolution // step * step
    found = {(square, square)}
    for side in range(step, int(resolution * RATIO) + 1, step):
        other = resolution * resolution // side // step * step
        if other and max(side, other) <= RATIO * min(side, other):
            found |= {(side, other), (other, side)}
    return sorted(found, key=lambda size: (size[1] / size[0], size[0] * size[1]))


def nearest_bucket(width: int, height: int, buckets: Sequence[tuple[int, int]]) -> int:
    """Position in `buckets` of the one whose aspect ratio is nearest to an image's; of equals the largest."""
    aspect = math.log(width / height)

    def distance(place: int) -> tuple[float, int]:
        tall, wide = buckets[place]
        return round(abs(math.log(wide / tall) - aspect), 9), -tall * wide

    return min(range(len(buckets)), key=distance)


def fit_pixels(image: Image, height: int, width: int, **how: Any) -> torch.Tensor:
    """The pixels of `fit`."""
    return fit(image, height, width, **how).pixels


def fit(
    image: Image,
    height: int,
    width: int,
    *,
    crop: Crop = "center",
    flip: bool = False,
    generator: torch.Generator | None = None,
) -> View:
    """The image resized to cover the size, then cut.

    crop="random" draws left and top from `generator`, then `flip` draws whether to mirror the image (half of them):
    the same generator state gives the same pixels. InputError when something is to be drawn without a generator, and
    for images slimmer than 1 to SLIMMEST.
    """
    import numpy as np
    import torch
    from PIL.Image import Resampling

    if crop not in CROPS:
        raise InputError(f"crop {crop!r} is unknown: choose one of {', '.join(CROPS)}")
    if generator is None and (flip or crop == "random"):
        raise InputError("a random crop or flip needs a generator: give one seeded by the position of the sample")
    if max(image.size) > SLIMMEST * min(image.size):
        raise InputError(
            f"{name_of(image)} of {image.width}x{image.height} px is more than {SLIMMEST} times as long as it is wide: "
            "next to nothing of it would be kept; crop it, or remove it"
        )
    full_width, full_height = _covering(image.width, image.height, height, width)
    spare = (full_width - width, full_height - height)
    left, top = _drawn(spare, generator) if crop == "random" and generator else (spare[0] // 2, spare[1] // 2)
    if full_width * full_height > _WASTE * width * height:  # resize only what is kept
        across, down = image.width / full_width, image.height / full_height
        box = (left * across, top * down, (left + width) * across, (top + height) * down)
        kept = to_rgb(image).resize((width, height), Resampling.LANCZOS, box)
    else:  # nearly the same, but for rounding: bits are as they always were
        whole = to_rgb(image)
        if (full_width, full_height) != image.size:
            whole = whole.resize((full_width, full_height), Resampling.LANCZOS)
        kept = whole.crop((left, top, left + width, top + height))
    array = np.asarray(kept, dtype=np.float32)
    pixels = torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1)
    view = View(pixels, (image.height, image.width, top, left, height, width))
    return mirrored(view) if flip and float(torch.rand(1, generator=generator)) < 0.5 else view


def mirrored(view: View) -> View:
    """The view of the mirrored image."""
    return View(view.pixels.flip(2), mirrored_sizes(view.sizes))


def mirrored_sizes(sizes: Sizes) -> Sizes:
    """Those of the mirrored image: what was cut off at the right is now at the left."""
    whole_height, whole_width, top, left, height, width = sizes
    full_width, _ = _covering(whole_width, whole_height, height, width)
    return whole_height, whole_width, top, full_width - width - left, height, width


def _covering(image_width: int, image_height: int, height: int, width: int) -> tuple[int, int]:
    """Width and height of an image that is just large enough to cover a size."""
    scale = max(width / image_width, height / image_height)
    return max(width, round(image_width * scale)), max(height, round(image_height * scale))


def _drawn(spare: tuple[int, int], generator: torch.Generator) -> tuple[int, int]:
    """One whole number in 0..spare for each; both are always drawn, so that what follows is the same for all sizes."""
    import torch

    left, top = (int(torch.randint(0, most + 1, (1,), generator=generator)) for most in spare)
    return left, top
