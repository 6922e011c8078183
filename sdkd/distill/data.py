"""Captioned images: a folder of a user's own, a named dataset, or one of the sources in `sdkd.distill.sources`."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sdkd.errors import InputError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

# Named datasets live on floors above this one, so they are named here and imported on use.
DATASETS = {"demo": "sdkd.demo.dataset:DemoImages"}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA = "metadata.jsonl"
FILE_COLUMN = "file_name"
CAPTION_COLUMNS = ("text", "caption", "prompt")
# What PIL's readers raise on damaged files, beside its own UnidentifiedImageError (an OSError).
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error)
_PROBES = 16  # rows that tell data sets apart
_PATTERN = re.compile(r"[*?\[{]")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_ORIENTATION = 0x0112  # EXIF
_UPRIGHT = (None, None, 0, 3, 1, 5, 4, 6, 2)  # EXIF orientation -> PIL.Image.Transpose; 5 and more swap the sides


class CaptionedImages(Protocol):
    """What the trainer learns from: rows {"image": PIL image, "caption": str} by index, such as a list or a Dataset.

    A source may also offer `caption(index)` and `image_size(index)` -> (width, height), both without decoding pixels,
    and `blocks`, ranges of indices that are best read together. InputError: this row cannot be read.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


def open_images(
    data: str | Path, *, image_column: str | None = None, caption_columns: Sequence[str] = CAPTION_COLUMNS
) -> CaptionedImages:
    """The images of a name in DATASETS, a folder, a file, a pattern of tar shards, or a Hugging Face dataset.

    The caption of a row is in the first of `caption_columns` that it has. Raises InputError when there are no captioned
    images or no such columns, and MissingExtraError where the package `datasets` is needed and missing.
    """
    name, path = str(data), Path(data).expanduser()
    if name in DATASETS:
        module, _, kind = DATASETS[name].partition(":")
        found: CaptionedImages = getattr(importlib.import_module(module), kind)()
        return found
    if path.is_dir() and (path / METADATA).is_file():
        return ImageFolder(path, image_column, caption_columns)
    from sdkd.distill.sources import open_source  # after the lines above, which need none of it

    return open_source(name, path, image_column, caption_columns) or ImageFolder(path, image_column, caption_columns)


class ImageFolder:
    """Images with captions from `metadata.jsonl` (file_name, text) or from a .txt file beside each image.

    Images are opened when asked for; InputError then names one that cannot be read.
    """

    def __init__(
        self, folder: Path, image_column: str | None = None, caption_columns: Sequence[str] = CAPTION_COLUMNS
    ) -> None:
        self.folder = folder
        self.rows: list[tuple[Path, str]] = list(
            _from_metadata(folder, image_column or FILE_COLUMN, caption_columns)
            if (folder / METADATA).is_file()
            else _from_sidecars(folder)
        )
        if not self.rows:
            raise InputError(
                f"data folder {str(folder)!r} holds no captioned images: add {METADATA} with lines like "
                '{"file_name": "0001.png", "text": "a red star"}, or a .txt beside each image '
                f"({', '.join(SUFFIXES)})"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        path, caption = self.rows[index]
        return {"image": decode(path, f"image {str(path)!r}"), "caption": caption}

    def caption(self, index: int) -> str:
        """Caption of one image."""
        return self.rows[index][1]

    def image_size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels, from the file's header."""
        path = self.rows[index][0]
        return decoded_size(path, f"image {str(path)!r}")


class FirstImages:
    """The first `count` of some images, as `max_images` asks for."""

    def __init__(self, images: CaptionedImages, count: int) -> None:
        self.images, self.count = images, min(count, len(images))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        return self.images[range(self.count)[index]]

    def caption(self, index: int) -> str:
        """Caption of one image, without decoding it where the source can."""
        return caption_at(self.images, range(self.count)[index])


def caption_at(images: CaptionedImages, index: int) -> str:
    """Caption of one image; of a source that does not offer captions alone, the whole row is read."""
    quick = getattr(images, "caption", None)
    return str(quick(index) if quick else images[index]["caption"])


def fingerprint(images: CaptionedImages) -> str:
    """Digest of some rows, evenly spread: enough to tell one data set from another."""
    digest = hashlib.sha256()
    for index in sorted({len(images) * probe // _PROBES for probe in range(_PROBES)}):
        try:
            row = images[index]
            digest.update(f"{row['caption']} {row['image'].size}".encode() + row["image"].convert("RGB").tobytes())
        except InputError:
            digest.update(b"unreadable")
    return digest.hexdigest()


def caption_of(row: Mapping[str, Any], columns: Sequence[str]) -> str | None:
    """The text in the first of the columns that the row has (of a list of texts the first one); None without one."""
    for name in columns:
        value = row.get(name)
        if isinstance(value, list | tuple):
            value = value[0] if value else None
        if value is not None:
            return str(value)
    return None


def decode(source: Path | bytes, name: str) -> Image:
    """An RGB image from a file or its bytes, turned upright as its EXIF says; InputError names what cannot be read."""
    from PIL import Image

    with _readable(name), Image.open(_stream(source)) as image:
        turn = _UPRIGHT[_orientation(image)]
        rgb = image.convert("RGB")
        return rgb if turn is None else rgb.transpose(Image.Transpose(turn))


def decoded_size(source: Path | bytes, name: str) -> tuple[int, int]:
    """Width and height in pixels of the upright image, from its header alone; InputError as `decode`."""
    from PIL import Image

    with _readable(name), Image.open(_stream(source)) as image:
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def _stream(source: Path | bytes) -> Path | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _orientation(image: Image) -> int:
    """1 to 8; 1, upright, when the EXIF data are missing or damaged."""
    if "exif" not in image.info:
        return 1
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _DAMAGED:
        return 1
    return value if value in range(1, 9) else 1


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    from PIL.Image import DecompressionBombError

    try:
        yield
    except (*_DAMAGED, zlib.error, DecompressionBombError) as error:
        raise InputError(f"{name} cannot be read ({error}): repair it, or remove it and its caption") from error


def _from_metadata(folder: Path, column: str, captions: Sequence[str]) -> Iterator[tuple[Path, str]]:
    lines = _text(folder / METADATA).splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _metadata_row(folder, number, line, column, captions)


def _metadata_row(folder: Path, number: int, line: str, column: str, captions: Sequence[str]) -> tuple[Path, str]:
    place = f"line {number} of {str(folder / METADATA)!r}"
    try:
        row: Mapping[str, Any] = json.loads(line)
        caption = caption_of(row, captions)
        path = folder / row[column]
        if caption is None:
            raise KeyError(*captions)
    except KeyError as missing:
        wanted = " or ".join(map(str, missing.args))
        raise InputError(
            f"{place} is not understood: give {{{column!r}: '0001.png', {captions[0]!r}: 'a caption'}} as JSON, one "
            f"object per line (no column {wanted}; its columns: {', '.join(row)})"
        ) from None
    except (json.JSONDecodeError, TypeError, AttributeError, IndexError):
        raise InputError(
            f'{place} is not understood: give {{"file_name": "0001.png", "text": "a caption"}}, one object per line'
        ) from None
    if not path.is_file():
        raise InputError(f"{place} names {row[column]!r}, which is not there: restore it or remove the line")
    return path, caption


def _from_sidecars(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES:
            continue
        text = path.with_suffix(".txt")
        if not text.is_file():
            raise InputError(
                f"image {str(path)!r} has no caption: put it into {text.name} beside it, or remove the image"
            )
        yield path, _text(text).strip()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"file {str(path)!r} is not UTF-8 text ({error}): convert it") from None


def matching(pattern: str) -> list[Path]:
    """The .tar or .parquet files of a path or of a pattern with *, ? and {00..99}; InputError when one is missing."""
    found: list[Path] = []
    for name in _braces(pattern):
        path = Path(name).expanduser()
        if _PATTERN.search(name):
            folder = Path(path.anchor or ".")
            found += sorted(folder.glob(str(path.relative_to(path.anchor) if path.anchor else path)))
        elif path.suffix in (".tar", ".parquet"):
            if not path.is_file():
                raise InputError(f"data file {name!r} does not exist: restore it, or correct the name or pattern")
            found.append(path)
    if _PATTERN.search(pattern) and not found:
        raise InputError(f"data pattern {pattern!r} matches no file: correct it; it may hold *, ? and {{00..99}}")
    if other := [path for path in found if path.suffix not in (".tar", ".parquet")]:
        raise InputError(f"data file {str(other[0])!r} is neither .tar nor .parquet: unpack it, or correct the pattern")
    return found


def _braces(pattern: str) -> Iterator[str]:
    """`a{00..02}` -> a00, a01, a02; `{x,y}` -> x, y, as a shell does."""
    before, opened, rest = pattern.partition("{")
    inside, closed, after = rest.partition("}")
    if not (opened and closed):
        yield pattern
        return
    if numbers := _RANGE.fullmatch(inside):
        low, high = numbers.groups()
        choices = [f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)]
    else:
        choices = inside.split(",")
    for choice in choices:
        yield from _braces(before + choice + after)


def to_pixels(image: Image, size: int) -> torch.Tensor:
    """A float32 tensor [3, size, size] in [-1, 1]: shorter side resized to `size` pixels, middle cut out."""
    from sdkd.distill.buckets import fit_pixels

    return fit_pixels(image, size, size)
