"""Drawn images as files, with their settings inside: PNG, JPEG and WebP."""

from __future__ import annotations

import io
import zlib

from sdkd.core.images import opened
from sdkd.errors import InputError
from sdkd.serve.caption import EXIF_IFD, PARAMETERS, UNICODE, USER_COMMENT
from sdkd.serve.jobs import Drawn
from sdkd.serve.uploads import ADVICE, check_pixels
from sdkd.serve.wanted import Limits

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
# Drawn images become about as small as by zlib's usual strategy, sooner.
_COMPRESSION = {"compress_level": 4, "compress_type": zlib.Z_RLE}


def encode(drawn: Drawn, format: str = "png", quality: int = 90) -> bytes:  # noqa: A002
    """A file of an image; `quality` of JPEG and WebP, 0 to 100. InputError for another format.

    A PNG has a text field for each setting and A1111's `parameters`; the others have these as EXIF's user comment.
    """
    from PIL import Image

    if format not in MEDIA_TYPES:
        raise InputError(f"format {format!r} is unknown: choose one of {', '.join(MEDIA_TYPES)}")
    image = Image.frombytes("RGB", (drawn.width, drawn.height), drawn.pixels)
    buffer = io.BytesIO()
    if format == "png":
        image.save(buffer, format="PNG", pnginfo=drawn.caption.png, **_COMPRESSION)
    else:
        # a quality of 0 would mean PIL's own default
        image.save(buffer, format=format.upper(), quality=max(1, quality), exif=drawn.caption.exif)
    return buffer.getvalue()


def text_in(data: bytes, what: str, limits: Limits) -> dict[str, str]:
    """The text fields of an image file, `parameters` of a JPEG or WebP among them; raises what `check_pixels` does."""
    check_pixels(data, what, limits)
    with opened(data, what, ADVICE) as image:
        # Of the header alone: PIL decodes all pixels of a PNG to look for text and EXIF data behind them.
        fields = {str(key): str(value) for key, value in image.info.items() if isinstance(value, str)}
        comment = None if image.format == "PNG" else image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT)
    if isinstance(comment, bytes) and comment.startswith(UNICODE):
        fields.setdefault(PARAMETERS, comment.removeprefix(UNICODE).decode("utf-16-be", "replace"))
    return fields
