"""Captioned images: a folder of a user's own, a named dataset, or one of the sources in `sdkd.distill.data.sources`."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkd.core.images import to_rgb
from sdkd.distill.data.image_folder import METADATA, ImageFolder, find_metadata
from sdkd.distill.data.rows import CAPTION_COLUMNS, CaptionedImages, caption_at
from sdkd.distill.data.sources import open_source
from sdkd.errors import InputError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

# Named datasets live on floors above this one, so they are named here and imported on use.
DATASETS = {"demo": "sdkd.demo.dataset:DemoImages"}
_PROBES = 16  # rows that tell data sets apart


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
    if path.is_dir() and find_metadata(path):
        return ImageFolder(path, image_column, caption_columns)
    if source := open_source(name, path, image_column, caption_columns):
        return source
    if path.is_dir():
        return ImageFolder(path, image_column, caption_columns)
    raise InputError(
        f"data {name!r} is no folder: give a folder of images with {METADATA} or a .txt beside each image, tar shards "
        f"('shards/*.tar'), parquet files, the id of a Hugging Face dataset, or one of {', '.join(DATASETS)}"
    )


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


def fingerprint(images: CaptionedImages) -> str:
    """Digest of some rows, evenly spread: enough to tell one data set from another."""
    digest = hashlib.sha256()
    for index in sorted({len(images) * probe // _PROBES for probe in range(_PROBES)}):
        try:
            row = images[index]
            digest.update(f"{row['caption']} {row['image'].size}".encode() + to_rgb(row["image"]).tobytes())
        except InputError:
            digest.update(b"unreadable")
    return digest.hexdigest()


def to_pixels(image: Image, size: int) -> torch.Tensor:
    """A float32 tensor [3, size, size] in [-1, 1]: shorter side resized to `size` pixels, middle cut out."""
    from sdkd.distill.data.buckets import fit_pixels

    return fit_pixels(image, size, size)
