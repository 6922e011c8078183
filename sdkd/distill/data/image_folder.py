"""Folders of image files, with captions in metadata.jsonl, metadata.csv, or a text file beside each image."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdkd.core.images import image_size, read_rgb
from sdkd.core.text_files import read_lines, read_text
from sdkd.distill.data.reader import LIMIT
from sdkd.distill.data.rows import CAPTION_COLUMNS, caption_of
from sdkd.errors import InputError

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
SIDECARS = (".txt", ".caption")  # the first that is there
METADATA = "metadata.jsonl"
METADATA_CSV = "metadata.csv"
TRAIN = "train"  # where Hugging Face's image folders keep the images to train on
FILE_COLUMN = "file_name"
_JSON_LINE = '{"file_name": "0001.png", "text": "a caption"}'


class Row(NamedTuple):
    """An image file and its caption, or why it cannot be used."""

    path: Path
    caption: str
    problem: str = ""


def hidden(name: str) -> bool:
    """Whether a file or folder is no one's data: `._a.png` and `__MACOSX` of macOS, `.ipynb_checkpoints`, `.git`."""
    return (name.startswith(".") and name not in (".", "..")) or name == "__MACOSX"


def files_below(folder: Path) -> list[Path]:
    """All files of a folder and its folders, sorted, hidden ones left out.

    Links to folders are followed; a folder that several lead to, or that holds itself, is read once.
    """
    found: list[Path] = []
    known: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        state = Path(place).stat()
        if (state.st_dev, state.st_ino) in known:
            folders.clear()
            continue
        known.add((state.st_dev, state.st_ino))
        folders[:] = sorted(name for name in folders if not hidden(name))
        found += [Path(place, name) for name in files if not hidden(name)]
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def images_below(folder: Path) -> list[Path]:
    """All images of a folder and its folders, as `files_below`; InputError when there are none."""
    found = [path for path in files_below(folder) if path.suffix.lower() in SUFFIXES]
    if not found:
        raise InputError(f"folder {str(folder)!r} holds no images ({', '.join(SUFFIXES)}): give one with images")
    return found


def find_metadata(folder: Path) -> Path | None:
    """The list of a folder's images: in itself, else in its folder `train`."""
    for place in (folder, folder / TRAIN):
        found = [place / name for name in (METADATA, METADATA_CSV) if (place / name).exists()]
        if len(found) == 2:
            log.warning("%s is used, %s beside it is not", *found)
        if found:
            return found[0]
    return None


class ImageFolder:
    """Images with captions from `metadata.jsonl`, `metadata.csv` (file_name, text), or a text file beside each image.

    Images are opened when asked for; InputError then names one that cannot be read or has no caption. More than 1 % of
    those that are not there or have none is an InputError at once.
    """

    def __init__(
        self, folder: Path, image_column: str | None = None, caption_columns: Sequence[str] = CAPTION_COLUMNS
    ) -> None:
        self.folder = folder
        if (listed := find_metadata(folder)) is not None:
            rows = _from_metadata(listed, image_column or FILE_COLUMN, caption_columns)
        else:
            rows = _from_sidecars(folder)
        self.rows: list[Row] = list(rows)
        if not self.rows:
            if (folder / "captions.jsonl").is_file():  # of sdkd cache
                raise InputError(f"data folder {str(folder)!r} is a cache of latents: give what it was made from")
            raise InputError(
                f"data folder {str(folder)!r} holds no captioned images: add {METADATA} with lines like "
                f"{_JSON_LINE}, {METADATA_CSV} with these two columns, or a .txt beside each image "
                f"({', '.join(SUFFIXES)})"
            )
        problems = [row.problem for row in self.rows if row.problem]
        if len(problems) > LIMIT * len(self.rows):
            more = f" ({len(problems)} of {len(self.rows)} are like that, {LIMIT:.0%} may be)" if problems[1:] else ""
            raise InputError(problems[0] + more)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        row = self._usable(index)
        return {"image": read_rgb(row.path), "caption": row.caption}

    def caption(self, index: int) -> str:
        """Caption of one image; InputError when it has none."""
        return self._usable(index).caption

    def image_size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels, from the file's header."""
        return image_size(self._usable(index).path)

    def _usable(self, index: int) -> Row:
        row = self.rows[index]
        if row.problem:
            raise InputError(row.problem)
        return row


def _from_metadata(listed: Path, column: str, captions: Sequence[str]) -> Iterator[Row]:
    for place, row in _csv_rows(listed) if listed.suffix == ".csv" else _json_rows(listed):
        yield _metadata_row(listed, place, row, column, captions)


def _json_rows(listed: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(read_lines(listed), 1):
        if not line.strip():
            continue
        place = f"line {number} of {str(listed)!r}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise InputError(f"{place} is not understood: give {_JSON_LINE}, one object per line")
        yield place, row


def _csv_rows(listed: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table with a header, separated by commas, semicolons or tabs: by what its header has most of."""
    text = read_text(listed).lstrip("\n")
    header = text.partition("\n")[0]
    options: dict[str, Any] = {"delimiter": max(",;\t", key=header.count), "strict": True, "skipinitialspace": True}
    table = csv.DictReader(io.StringIO(text, newline=""), **options)
    place, advice = f"line 2 of {str(listed)!r}", "put captions that hold separators into double quotes"
    try:
        for row in table:
            if None in row:
                raise InputError(f"{place} has more values than the header has columns: {advice}")
            yield place, row
            place = f"line {table.line_num + 1} of {str(listed)!r}"
    except csv.Error as error:
        raise InputError(f"{place} cannot be read ({error}): {advice}") from None


def _metadata_row(listed: Path, place: str, row: Mapping[str, Any], column: str, captions: Sequence[str]) -> Row:
    file: Any = row.get(column)
    caption = caption_of(row, captions)
    lacking = [] if isinstance(file, str) else [column]
    if lacking or not any(name in row for name in captions):
        how = f"{{{column!r}: '0001.png', {captions[0]!r}: 'a caption'}} as JSON, one object per line"
        if listed.suffix == ".csv":
            how = f"the columns {column},{captions[0]} in its first line"
        wanted, found = " or ".join(lacking or captions), ", ".join(map(str, row))
        problem = f"{place} is not understood: give {how} (no column {wanted}; its columns: {found})"
    elif caption is None:
        problem = f"{place} has no caption in {', '.join(captions)}: add it, or remove the line"
    elif not os.path.isfile(listed.parent / file):  # noqa: PTH113 - takes names of any length
        problem = f"{place} names {file!r}, which is not there: restore it or remove the line"
    else:
        return Row(listed.parent / file, caption)
    return Row(listed, "", problem)


def _from_sidecars(folder: Path) -> Iterator[Row]:
    files = files_below(folder)
    texts = {(path.with_suffix(""), path.suffix.lower()): path for path in files if path.suffix.lower() in SIDECARS}
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    pictured = {path.with_suffix("") for path in images}
    if images and (alone := [path for (stem, _), path in texts.items() if stem not in pictured]):
        log.warning("%d text files have no image beside them of a kind that is read, such as %s", len(alone), alone[0])
    notes: list[str] = []
    for path in images:
        kinds = (texts.get((path.with_suffix(""), kind)) for kind in SIDECARS)
        if text := next(filter(None, kinds), None):
            yield Row(path, read_text(text, notes).strip())
            continue
        wanted = path.with_suffix(SIDECARS[0]).name
        yield Row(path, "", f"image {str(path)!r} has no caption: put it into {wanted} beside it, or remove the image")
    if notes:
        log.warning("%s%s", notes[0], f" (and {len(notes) - 1} more)" if notes[1:] else "")
