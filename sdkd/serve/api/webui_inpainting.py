"""Inpainting as A1111 does it: a soft mask, its area alone at full size, and the rest of the image kept to the bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sdkd.serve.jobs import Drawn
from sdkd.serve.uploads import as_png, read_images
from sdkd.serve.wanted import Limits

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[int, int, int, int]  # left, top, right and bottom, pixels
_SOFT = (64, 16, 4, 2)  # pixels that the surroundings are smeared into a masked area over, far to near
_REACH = 4  # where a quarter of what is within that distance is known, it covers what is smeared over more


@dataclass(frozen=True)
class Inpainting:
    """An image, its mask (white is drawn again) and the box of both that is drawn."""

    image: Image
    mask: Image
    box: Box
    fills: bool  # whether the masked area starts from its surroundings, not from what is there

    def inputs(self) -> tuple[bytes, bytes]:
        """The image and mask to draw from."""
        image, mask = self.image.crop(self.box), self.mask.crop(self.box)
        return as_png(_filled(image, mask) if self.fills else image), as_png(mask)

    def onto(self, drawn: Drawn) -> Drawn:
        """What was drawn put into the image, whose size it has where only a part of it was drawn."""
        from PIL import Image
        from PIL.Image import Resampling

        patch = Image.frombytes("RGB", (drawn.width, drawn.height), drawn.pixels)
        if self.box == (0, 0, *self.image.size):
            base, mask = (one.resize(patch.size, Resampling.LANCZOS) for one in (self.image, self.mask))
            base.paste(patch, (0, 0), mask)
        else:
            base, size = self.image.copy(), (self.box[2] - self.box[0], self.box[3] - self.box[1])
            base.paste(patch.resize(size, Resampling.LANCZOS), self.box[:2], self.mask.crop(self.box))
        return replace(drawn, width=base.width, height=base.height, pixels=base.tobytes())


def inpainting(
    image: bytes,
    mask: bytes,
    limits: Limits,
    *,
    size: tuple[int, int],
    blur: tuple[float, float] = (0, 0),
    inverted: bool = False,
    fills: bool = False,
    only_masked: bool = False,
    padding: int = 0,
) -> Inpainting:
    """Read and prepare an image and its mask; raises what `read_images` raises.

    `size`: width and height that are drawn. `blur`: of the mask's edge, pixels. `only_masked`: draw the masked area
    alone, with `padding` pixels around it, and as much more as gives it the proportions of `size`.
    """
    from PIL import ImageChops, ImageFilter

    read = read_images(image, mask, limits)
    whole = read["image"]
    white = read["mask"] if read["mask"].size == whole.size else read["mask"].resize(whole.size)
    if inverted:
        white = ImageChops.invert(white)
    if any(blur):
        white = white.filter(ImageFilter.GaussianBlur(blur))
    seen = white.getbbox() if only_masked else None  # None, too, for a mask that is black
    box = (0, 0, *whole.size) if seen is None else _around(seen, padding, size, whole.size)
    return Inpainting(whole, white, box, fills)


def _around(seen: Box, padding: int, size: tuple[int, int], limit: tuple[int, int]) -> Box:
    """A box with room around it, in the proportions of `size` as far as the image goes."""
    starts, ends = [], []
    wide = [seen[axis + 2] - seen[axis] + 2 * padding for axis in (0, 1)]
    scale = max(wide[0] / size[0], wide[1] / size[1])
    for axis in (0, 1):
        length = min(round(size[axis] * scale), limit[axis])
        middle = (seen[axis] + seen[axis + 2]) / 2
        start = min(max(0, round(middle - length / 2)), limit[axis] - length)
        starts.append(start)
        ends.append(start + length)
    return (starts[0], starts[1], ends[0], ends[1])


def _filled(image: Image, mask: Image) -> Image:
    """The image with its masked area in the colours of what is around it, the nearest ones most."""
    from PIL import Image, ImageChops, ImageFilter, ImageStat

    kept = ImageChops.invert(mask)
    if kept.getbbox() is None:
        return image
    known = Image.new("RGBa", image.size)
    known.paste(image.convert("RGBA").convert("RGBa"), (0, 0), kept)
    average = tuple(round(value) for value in ImageStat.Stat(image, kept).mean)
    found = Image.new("RGBA", image.size, (*average, 255))
    for radius in _SOFT:
        layer = known.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        layer.putalpha(layer.getchannel("A").point(lambda value: min(255, value * _REACH)))
        found.alpha_composite(layer)
    found.alpha_composite(known.convert("RGBA"))
    return found.convert("RGB")
