"""The demo's picture: what every model draws, eagerly and on an engine."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdkd.core.files import write_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

    from sdkd.compare.measure.results import Report

PICTURE = "demo.png"


def draw(report: Report, path: Path) -> None:
    """One picture: every model eagerly, and on the first of its engines."""
    rows, seen = {}, set()
    for row in report.results:
        kind = (row.subject.model_key, row.subject.is_eager)
        if kind not in seen:
            seen.add(kind)
            rows[row.subject.label] = report.images[row.subject.label]
    stream = io.BytesIO()
    contact_sheet(rows, report.setup.prompts).save(stream, "PNG", optimize=True)
    write_bytes(path, stream.getvalue())


def contact_sheet(rows: Mapping[str, Sequence[Image]], captions: Sequence[str]) -> Image:
    """A row per subject, a column per prompt; small images are enlarged without smoothing: every pixel shows."""
    from PIL import Image as Pillow
    from PIL import ImageDraw, ImageFont

    def write(place: tuple[int, int], text: str, size: int, columns: int) -> None:
        drawn.multiline_text(place, textwrap.fill(text, columns), fill=(32, 33, 36), font=ImageFont.load_default(size))

    cell, gap, label_width, head = 160, 8, 150, 64  # pixels
    width, height = label_width + len(captions) * (cell + gap), head + len(rows) * (cell + gap)
    sheet = Pillow.new("RGB", (width, height), "white")
    drawn = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        write((label_width + column * (cell + gap), 4), caption, 13, 24)
    for row, (label, images) in enumerate(rows.items()):
        top = head + row * (cell + gap)
        write((4, top + cell // 2 - 16), label, 15, 18)
        for column, image in enumerate(images):
            enlarged = image.resize((cell, cell), Pillow.Resampling.NEAREST)
            sheet.paste(enlarged, (label_width + column * (cell + gap), top))
    return sheet
