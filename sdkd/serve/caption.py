"""What an image's file says about it: its settings, one by one and as A1111 writes them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from engines.generate.drawing import png_text
from sdkd.serve.parameters import write

if TYPE_CHECKING:
    from PIL.Image import Exif
    from PIL.PngImagePlugin import PngInfo

PARAMETERS = "parameters"  # the text field of a PNG that holds the text of sdkd.serve.parameters
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286  # where JPEG and WebP have it
UNICODE = b"UNICODE\0"  # how EXIF marks a comment in UTF-16
_ROOM = 65_000  # bytes of EXIF data that a JPEG has room for


@dataclass(frozen=True)
class Caption:
    """The settings of an image, and the forms that files have them in, each made once."""

    settings: dict[str, str]

    def prepare(self) -> None:
        """Make what a PNG needs, so that it waits for pixels alone."""
        _ = self.png

    @cached_property
    def parameters(self) -> str:
        """A1111's text."""
        return write(self.settings)

    @cached_property
    def png(self) -> PngInfo:
        """A text field for each setting, and A1111's."""
        info = png_text(self.settings)
        # As A1111 does it: in Latin-1 where that is enough, which is all that some programs look for.
        info.add_text(PARAMETERS, self.parameters)
        return info

    @cached_property
    def exif(self) -> Exif:
        """A1111's text as a user comment; empty where prompts are so long that a JPEG has no room for them."""
        from PIL import Image

        exif, text = Image.Exif(), self.parameters.encode("utf-16-be")
        if len(text) < _ROOM:
            exif.get_ifd(EXIF_IFD)[USER_COMMENT] = UNICODE + text
        return exif
