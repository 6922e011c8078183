"""The data of a run by name: captioned images of any source, or the latents of a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkd.distill.data.image_folder import METADATA, ImageFolder, find_metadata
from sdkd.distill.data.rows import CAPTION_COLUMNS, CaptionedImages, caption_at
from sdkd.distill.data.sources import open_source
from sdkd.errors import InputError

if TYPE_CHECKING:
    from sdkd.distill.data.disk_cache import DiskCache


def open_images_or_cache(
    data: str, image_column: str | None = None, caption_columns: Sequence[str] = ()
) -> CaptionedImages | DiskCache:
    """Images as `open_images` gives them, by default with its columns, or the latents of a folder of `sdkd cache`."""
    from sdkd.distill.data.disk_cache import INDEX, DiskCache

    if (Path(data).expanduser() / INDEX).is_file():
        if image_column or tuple(caption_columns) not in ((), CAPTION_COLUMNS):
            raise InputError(f"cache {data!r} has no columns: leave --image-column and --caption-columns out")
        return DiskCache(Path(data).expanduser())
    return open_images(data, image_column=image_column, caption_columns=caption_columns or CAPTION_COLUMNS)


def open_images(
    data: str | Path, *, image_column: str | None = None, caption_columns: Sequence[str] = CAPTION_COLUMNS
) -> CaptionedImages:
    """The demo's images, those of a folder, a file, a pattern of tar shards, or a Hugging Face dataset.

    The caption of a row is in the first of `caption_columns` that it has. Raises InputError when there are no captioned
    images or no such columns, and MissingExtraError where the package `datasets` is needed and missing.
    """
    name, path = str(data), Path(data).expanduser()
    if name == "demo":
        from sdkd.toyworld.scenes import DemoImages

        return DemoImages()
    if path.is_dir() and find_metadata(path):
        return ImageFolder(path, image_column, caption_columns)
    if source := open_source(name, path, image_column, caption_columns):
        return source
    if path.is_dir():
        return ImageFolder(path, image_column, caption_columns)
    raise InputError(
        f"data {name!r} is no folder: give a folder of images with {METADATA} or a .txt beside each image, tar shards "
        "('shards/*.tar'), parquet files, the id of a Hugging Face dataset, or demo"
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
