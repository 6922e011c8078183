"""Images that people made: the one reader of all of them, for training, evaluation and generation.

Images come upright (EXIF, XMP), as the first frame, in RGB of 8 bits; what is transparent lies on white. Deeper pixels
are scaled by their range, never cut off at 255: that of 16 bits is 65535; of whole numbers of 32 bits, and of floats,
it is the smallest of `_RANGES` that holds all values of the image; those that would leave it nearly black are refused.
"""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkd.errors import EngineError, InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

# What PIL's readers raise on damaged files, beside its own UnidentifiedImageError (an OSError).
DAMAGED = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError),
    *(AttributeError, struct.error, zlib.error),
)
_RANGES = {"I": (255, 65535, 2**31 - 1), "F": (1, 255, 65535)}  # the largest value, by PIL's mode
_LEVELS = 16  # an image that fills less than this part of a wider range was not made for it
_PROGRAMS = ("EPS", "WMF", "EMF")  # drawings that another program would have to run
_NAME = "of sdkd"  # key of PIL's info
_ORIENTATION = 0x0112  # EXIF
_UPRIGHT = (None, None, 0, 3, 1, 5, 4, 6, 2)  # EXIF orientation -> PIL.Image.Transpose; 5 and more swap the sides
_REPAIR = "repair it, or remove it and its caption"


def read_rgb(source: Path | bytes, what: str = "", advice: str = _REPAIR) -> Image:
    """An RGB image from a file or its bytes; InputError, which begins with `what`, when it cannot be read."""
    with opened(source, what, advice) as image:
        found = _upright(image, to_rgb(image))
    found.info[_NAME] = _name(source, what)
    return found


def name_of(image: Image) -> str:
    """What an image that `read_rgb` gave is called in messages; 'an image' for others."""
    return str(image.info.get(_NAME, "an image"))


def _name(source: Path | bytes, what: str) -> str:
    return what or (f"image {str(source)!r}" if isinstance(source, Path) else "an image")


def read_mask(source: Path | bytes, what: str = "", advice: str = _REPAIR) -> Image:
    """A mask, mode L, from a file or its bytes; see `to_mask`. InputError as `read_rgb`."""
    with opened(source, what, advice) as image:
        return _upright(image, to_mask(image))


def image_size(source: Path | bytes, what: str = "") -> tuple[int, int]:
    """Width and height in pixels of the upright image, from its header alone; InputError as `read_rgb`."""
    from PIL.Image import Image

    with opened(source, what) as image:
        width, height = image.size
        if image.format == "TIFF":  # PIL gives these upright
            return width, height
        # Image's own method: that of PNG would decode all pixels to look for EXIF data behind them
        return (height, width) if _orientation(Image.getexif, image) >= 5 else (width, height)


@contextlib.contextmanager
def opened(source: Path | bytes, what: str = "", advice: str = _REPAIR) -> Iterator[Image]:
    """An image as PIL opens it; whatever goes wrong with it inside the block is an InputError that names it."""
    from PIL import Image

    name = _name(source, what)
    try:
        if isinstance(source, Path) and source.is_fifo():
            raise ValueError("it is a pipe, of which reading may never end")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.format in _PROGRAMS:
                raise ValueError(f"{image.format} is a drawing, not pixels")
            yield image
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise InputError(
            f"{name} cannot be read as an image ({str(error) or type(error).__name__}): {advice}"
        ) from error


def to_rgb(image: Image) -> Image:
    """An image of any of PIL's modes as RGB: scaled by its range, and on white where it is transparent.

    InputError for numbers that no range holds.
    """
    import PIL.Image

    image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = _rgba(image)
    return PIL.Image.alpha_composite(PIL.Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def to_mask(image: Image) -> Image:
    """An image of any of PIL's modes as a mask, mode L: white is repainted, black is kept.

    Luminance; what is transparent is black. Where all that can be seen is of one colour, as of strokes on an empty
    layer, the opacity is the mask, whatever the colour. InputError as `to_rgb`.
    """
    import numpy as np
    import PIL.Image

    image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB").convert("L")
    rgba = _rgba(image)
    values = np.asarray(rgba)
    opacity, seen = values[..., 3], values[values[..., 3] > 0][:, :3]
    if opacity.min() < opacity.max() and (seen == seen[0]).all():
        return rgba.getchannel("A")
    return PIL.Image.alpha_composite(PIL.Image.new("RGBA", rgba.size, "black"), rgba).convert("RGB").convert("L")


def _rgba(image: Image) -> Image:
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def _eight_bits(image: Image) -> Image:
    """The image itself, or one of mode L (LA with a transparent value) where its numbers are wider than a byte."""
    import numpy as np
    import PIL.Image

    if image.mode[0] not in "IF":
        return image
    values = np.asarray(image)
    grey = PIL.Image.fromarray(_scaled(values, image))
    if (clear := image.info.get("transparency")) is not None:
        grey.putalpha(PIL.Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _scaled(values: NDArray[Any], image: Image) -> NDArray[np.uint8]:
    """Numbers of more than 8 bits as uint8; InputError when no range holds them."""
    import numpy as np

    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError("it holds numbers that are not finite")
    if image.mode.startswith("I;16") or (image.format == "PPM" and image.mode == "I"):
        most = 65535
    else:
        ranges = _RANGES[image.mode]
        most = next((limit for limit in ranges if high <= limit), 0)
        if low < 0 or not most or (most > ranges[0] and high * _LEVELS < most):
            raise InputError(
                f"its numbers go from {low:g} to {high:g}, a range that is not known: scale them to 0..{ranges[0]}, "
                "or to 0..65535 in a 16-bit PNG"
            )
    if values.dtype.kind == "f":
        return np.rint(values * (255 / most)).astype(np.uint8)
    return ((values.astype(np.uint64) * 255 + most // 2) // most).astype(np.uint8)


def _upright(image: Image, converted: Image) -> Image:
    from PIL.Image import Transpose

    turn = _UPRIGHT[_orientation(type(image).getexif, image)]
    return converted if turn is None else converted.transpose(Transpose(turn))


def _orientation(read: Callable[[Any], Mapping[int, Any]], image: Image) -> int:
    """1 to 8, from EXIF or XMP data; 1, upright, when they are missing or damaged."""
    try:
        value = read(image).get(_ORIENTATION, 1)
    except DAMAGED:
        return 1
    return value if value in range(1, 9) else 1


def is_finite(images: NDArray[Any]) -> bool:
    """Whether pixels (any shape, 0 to 1) are neither NaN nor infinite: a picture would show such ones as black."""
    import numpy as np

    return bool(np.isfinite(images).all())


def check_finite(images: NDArray[Any], which: str) -> None:
    """EngineError for NaN and infinite pixels, which would be saved as black; `images`: [n, h, w, 3], 0 to 1."""
    if not is_finite(images):
        raise EngineError(
            f"{which}: pixels are not finite (NaN or infinity), so nothing was written. Weights that hold NaN, "
            "activations that overflow in fp16 or a scale that is far too high are usual causes: try --precision fp32 "
            "when exporting, the original weights, or a guidance scale of about 7"
        )
