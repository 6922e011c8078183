"""Captioned images: a folder of a user's own, or a named dataset loaded on use."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
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
_CAPTION_KEYS = ("text", "caption", "prompt")


class CaptionedImages(Protocol):
    """What the trainer learns from: rows {"image": PIL image, "caption": str} by index, such as a list or a Dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


def open_images(data: str | Path) -> CaptionedImages:
    """The dataset of a name in DATASETS or of a folder; InputError when it is neither or has no captioned images."""
    if str(data) in DATASETS:
        module, _, name = DATASETS[str(data)].partition(":")
        found: CaptionedImages = getattr(importlib.import_module(module), name)()
        return found
    if not Path(data).is_dir():
        raise InputError(
            f"data {str(data)!r} is no folder: give a folder of images with {METADATA} or a .txt beside each image, "
            f"or one of {', '.join(DATASETS)}"
        )
    return ImageFolder(Path(data))


class ImageFolder:
    """Images with captions from `metadata.jsonl` (file_name, text) or from a .txt file beside each image.

    Images are opened when asked for; InputError then names one that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        read = _from_metadata if (folder / METADATA).is_file() else _from_sidecars
        self.rows: list[tuple[Path, str]] = list(read(folder))
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
        return {"image": _open(path), "caption": caption}


def _open(path: Path) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise InputError(
            f"image {str(path)!r} cannot be read ({error}): repair it, or remove it and its caption"
        ) from error


def _from_metadata(folder: Path) -> Iterator[tuple[Path, str]]:
    lines = (folder / METADATA).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _metadata_row(folder, number, line)


def _metadata_row(folder: Path, number: int, line: str) -> tuple[Path, str]:
    place = f"line {number} of {str(folder / METADATA)!r}"
    try:
        row: Mapping[str, Any] = json.loads(line)
        path = folder / row["file_name"]
        caption = next(row[key] for key in _CAPTION_KEYS if key in row)
    except (json.JSONDecodeError, KeyError, TypeError, StopIteration):
        raise InputError(
            f'{place} is not understood: give {{"file_name": "0001.png", "text": "a caption"}}, one object per line'
        ) from None
    if not path.is_file():
        raise InputError(f"{place} names {row['file_name']!r}, which is not there: restore it or remove the line")
    return path, str(caption)


def _from_sidecars(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES:
            continue
        text = path.with_suffix(".txt")
        if not text.is_file():
            raise InputError(
                f"image {str(path)!r} has no caption: put it into {text.name} beside it, or remove the image"
            )
        yield path, text.read_text(encoding="utf-8").strip()


def to_pixels(image: Image, size: int) -> torch.Tensor:
    """A float32 tensor [3, size, size] in [-1, 1]: shorter side resized to `size` pixels, middle cut out."""
    import numpy as np
    import torch
    from PIL.Image import Resampling

    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.convert("RGB")
    if (width, height) != image.size:
        resized = resized.resize((width, height), Resampling.LANCZOS)
    array = np.asarray(resized.crop((left, top, left + size, top + size)), dtype=np.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1)
