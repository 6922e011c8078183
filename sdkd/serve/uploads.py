"""Images that come with a request: as base64 or as an uploaded file, checked for their size before they are decoded."""

from __future__ import annotations

import base64
import binascii
import io
from typing import TYPE_CHECKING

from sdkd.core.images import opened, read_mask, read_rgb
from sdkd.errors import InputError
from sdkd.serve.errors import TooLargeError
from sdkd.serve.wanted import Limits

if TYPE_CHECKING:
    from PIL.Image import Image
    from starlette.datastructures import UploadFile

ADVICE = "send a PNG, JPEG or WebP file"
_READERS = {"image": read_rgb, "mask": read_mask}


def from_base64(text: str, what: str, limits: Limits) -> bytes:
    """The file in base64 text, which may be a data URI; what is no base64 is an InputError that names `what`.

    Spaces and line breaks are left out. TooLargeError beyond `body_bytes`.
    """
    text = text.strip()
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise InputError(f"{what} is a data URI without base64 ({head[:60]!r}): send data:image/png;base64,...")
        if not head[5:].lower().startswith(("image/", "application/octet-stream", ";")):
            raise InputError(f"{what} is a data URI of something else ({head[:60]!r}): {ADVICE} in base64")
    elif "://" in text[:12]:
        raise InputError(f"{what} is an address ({text[:60]!r}), and nothing is fetched from one: {ADVICE} in base64")
    text = "".join(text.split())
    _check_bytes(len(text) // 4 * 3 - text[-2:].count("="), what, limits)
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{what} is not base64 ({error}): {ADVICE} in base64") from error
    return _not_empty(data, what)


async def from_upload(file: UploadFile, what: str, limits: Limits) -> bytes:
    """The bytes of an uploaded file. InputError for an empty one, TooLargeError beyond `body_bytes`."""
    data = await file.read(limits.body_bytes + 1)
    _check_bytes(len(data), what, limits)
    return _not_empty(data, what)


def _check_bytes(size: int, what: str, limits: Limits) -> None:
    if size > limits.body_bytes:
        raise TooLargeError(
            f"{what} is larger than the {limits.body_bytes} bytes that this server takes: send a smaller image"
        )


def _not_empty(data: bytes, what: str) -> bytes:
    if not data:
        raise InputError(f"{what} is empty: {ADVICE}, or leave it out")
    return data


def read_images(image: bytes | None, mask: bytes | None, limits: Limits) -> dict[str, Image]:
    """The images in files by input: `image` in RGB, `mask` in grey, white where it is drawn again.

    Nothing is decoded whose header says more than `pixels`: TooLargeError. InputError for what cannot be read, and for
    a mask without an image.
    """
    if mask is not None and image is None:
        raise InputError("mask has no image to act on: send image, too")
    given = {name: data for name, data in (("image", image), ("mask", mask)) if data is not None}
    for name, data in given.items():
        check_pixels(data, name, limits)
    return {name: _READERS[name](data, name, ADVICE) for name, data in given.items()}


def check_pixels(data: bytes, what: str, limits: Limits) -> None:
    """TooLargeError where the header of an image file says more than `pixels`, InputError where it has none."""
    with opened(data, what, ADVICE) as image:
        width, height = image.size
    if width * height > limits.pixels:
        raise TooLargeError(
            f"{what} of {width}x{height} pixels is larger than this server takes ({limits.pixels} pixels): send a "
            "smaller one"
        )


def mask_of_transparency(data: bytes, what: str, limits: Limits) -> bytes:
    """A mask as OpenAI has it, transparent where the image is drawn again, as one of ours: a PNG, white there.

    InputError where nothing is transparent, and as `read_images`.
    """
    from PIL import ImageChops, ImageOps

    check_pixels(data, what, limits)
    with opened(data, what, ADVICE) as image:
        # Upright first, as `read_rgb` turns the image that it belongs to.
        opacity = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
    if opacity.getextrema()[0] == 255:
        raise InputError(f"{what} is opaque everywhere: make it transparent where the image is to be drawn again")
    return as_png(ImageChops.invert(opacity))


def as_png(image: Image) -> bytes:
    """An image that goes on to the process that draws, which is on this machine: compressed little."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
