"""One picture of what the demo drew: a row per subject, a column per prompt."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sdkd.core.files import write_bytes

CELL, GAP, LABEL, HEAD = 160, 8, 150, 64  # pixels
INK, PAPER = (32, 33, 36), (255, 255, 255)


def contact_sheet(rows: Mapping[str, Sequence[Image.Image]], captions: Sequence[str]) -> Image.Image:
    """A labelled grid; small images are enlarged without smoothing, so that every pixel shows."""
    width = LABEL + len(captions) * (CELL + GAP)
    sheet = Image.new("RGB", (width, HEAD + len(rows) * (CELL + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        _text(draw, (LABEL + column * (CELL + GAP), 4), caption, 13, 24)
    for row, (label, images) in enumerate(rows.items()):
        top = HEAD + row * (CELL + GAP)
        _text(draw, (4, top + CELL // 2 - 16), label, 15, 18)
        for column, image in enumerate(images):
            enlarged = image.resize((CELL, CELL), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (LABEL + column * (CELL + GAP), top))
    return sheet


def _text(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, columns: int) -> None:
    draw.multiline_text(place, textwrap.fill(text, columns), fill=INK, font=ImageFont.load_default(size))


def write_sheet(path: Path, rows: Mapping[str, Sequence[Image.Image]], captions: Sequence[str]) -> None:
    """Write the grid as PNG, whole or not at all."""
    stream = io.BytesIO()
    contact_sheet(rows, captions).save(stream, "PNG", optimize=True)
    write_bytes(path, stream.getvalue())
