"""Drawn images as files, with their settings inside: PNG, JPEG and WebP."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from engines.generate.drawing import png_text
from sdkd.core.images import opened
from sdkd.errors import InputError
from sdkd.serve.jobs import Drawn
from sdkd.serve.parameters import write
from sdkd.serve.uploads import ADVICE, check_pixels
from sdkd.serve.wanted import Limits

if TYPE_CHECKING:
    from PIL.Image import Exif
    from PIL.PngImagePlugin import PngInfo

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
PARAMETERS = "parameters"  # the text field of a PNG that holds the text of sdkd.serve.parameters
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286  # where JPEG and WebP have it
_UNICODE = b"UNICODE\0"  # how EXIF marks a comment in UTF-16
_COMPRESSION = 4  # of zlib, 0 to 9: a small image takes less than a millisecond
_ROOM = 65_000  # bytes of EXIF data that a JPEG has room for


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
        image.save(buffer, format="PNG", pnginfo=_text_fields(drawn.settings), compress_level=_COMPRESSION)
    else:
        # a quality of 0 would mean PIL's own default
        image.save(buffer, format=format.upper(), quality=max(1, quality), exif=_comment(drawn.settings))
    return buffer.getvalue()


def text_in(data: bytes, what: str, limits: Limits) -> dict[str, str]:
    """The text fields of an image file, `parameters` of a JPEG or WebP among them; raises what `check_pixels` does."""
    check_pixels(data, what, limits)
    with opened(data, what, ADVICE) as image:
        # Of the header alone: PIL decodes all pixels of a PNG to look for text and EXIF data behind them.
        fields = {str(key): str(value) for key, value in image.info.items() if isinstance(value, str)}
        comment = None if image.format == "PNG" else image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    if isinstance(comment, bytes) and comment.startswith(_UNICODE):
        fields.setdefault(PARAMETERS, comment.removeprefix(_UNICODE).decode("utf-16-be", "replace"))
    return fields


def _text_fields(settings: dict[str, str]) -> PngInfo:
    info = png_text(settings)
    # As A1111 does it: in Latin-1 where that is enough, which is all that some programs look for.
    info.add_text(PARAMETERS, write(settings))
    return info


def _comment(settings: dict[str, str]) -> Exif:
    """EXIF data with the settings; empty where prompts are so long that a JPEG has no room for them."""
    from PIL import Image

    exif, text = Image.Exif(), write(settings).encode("utf-16-be")
    if len(text) < _ROOM:
        exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _UNICODE + text
    return exif
