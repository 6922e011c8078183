"""Captioned images in tables: parquet files and Hugging Face datasets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdkd.core.images import image_size, read_rgb
from sdkd.distill.data.rows import caption_of
from sdkd.errors import InputError, MissingExtraError

_IMAGE_NAMES = ("image", "img", "jpg", "png", "webp")


class TableImages:
    """Rows of a `datasets.Dataset`: images as bytes or as paths, captions from the first column there is.

    Paths that are not absolute begin in one of `homes`, the folders of the table's files, or where the process is.
    Raises InputError, listing the columns, when one is missing.
    """

    def __init__(
        self,
        table: Any,
        image_column: str | None,
        caption_columns: Sequence[str],
        name: str = "parquet",
        homes: Sequence[Path] = (),
    ) -> None:
        import datasets

        columns: dict[str, Any] = dict(table.features)
        self._name, self._homes = name, homes
        self._captions = tuple(column for column in caption_columns if column in columns)
        if not self._captions:
            raise no_column("caption", caption_columns, columns, name)
        of_kind = [column for column, kind in columns.items() if isinstance(kind, datasets.Image)]
        choices = [image_column] if image_column else [*of_kind, *_IMAGE_NAMES]
        self._image = next((column for column in choices if column in columns), "")
        if not self._image:
            raise no_column("image", choices, columns, name)
        if isinstance(columns[self._image], datasets.Image):
            table = table.cast_column(self._image, datasets.Image(decode=False))
        self._table = table.select_columns([self._image, *self._captions])
        self._texts = table.select_columns(list(self._captions))

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        row = self._table[index]
        return {"image": read_rgb(self._source(row, index), self._row(index)), "caption": self._caption(row, index)}

    def caption(self, index: int) -> str:
        """Caption of one image; InputError when it has none."""
        return self._caption(self._texts[index], index)

    def image_size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels, from the image's header."""
        return image_size(self._source(self._table[index], index), self._row(index))

    def _row(self, index: int) -> str:
        return f"image {index} of {self._name!r}"

    def _caption(self, row: Mapping[str, Any], index: int) -> str:
        found = caption_of(row, self._captions)
        if found is None:
            raise InputError(f"{self._row(index)} has no caption in {', '.join(self._captions)}: add it, or remove it")
        return found

    def _source(self, row: Mapping[str, Any], index: int) -> Path | bytes:
        value = row[self._image]
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if isinstance(value, str):
            places = [home / value for home in self._homes]  # the same place for all when it is absolute
            return next((place for place in places if place.is_file()), Path(value))
        raise InputError(
            f"{self._row(index)} is neither bytes nor a path in column {self._image!r}: repair or remove it"
        )


def no_column(kind: str, wanted: Sequence[str], columns: Mapping[str, Any], name: str) -> InputError:
    """That data have none of the wanted columns; `kind`: image or caption."""
    return InputError(
        f"data {name!r} has no {kind} column {' or '.join(wanted)}: its columns are {', '.join(columns) or 'none'}; "
        f"name one with --{kind}-column{'s' if kind == 'caption' else ''}"
    )


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "train", "reading parquet and Hugging Face datasets") from error
    return datasets


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def load_table(name: str, **options: Any) -> Any:
    """The split `train` of a hub dataset, of a folder of parquet files, or of such files."""
    datasets = _datasets()
    try:
        with _quiet(datasets):
            return datasets.load_dataset(name, split="train", **options)
    except (OSError, ValueError, LookupError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        what = options.get("data_files", [name])[0]
        if options or Path(name).exists():
            raise InputError(
                f"data {what!r} could not be loaded ({reason}): restore or remove the parquet file that is damaged, or "
                "give a folder with images or tables"
            ) from error
        raise InputError(
            f"data {what!r} could not be loaded ({reason}); no folder of that name is here either: check the name, its "
            "split `train` and the network; or load it elsewhere, `save_to_disk` it, and give that folder"
        ) from error


def load_saved(path: Path) -> Any:
    """What `save_to_disk` wrote: its split `train` where it has splits; InputError without one, or when damaged."""
    datasets = _datasets()
    try:
        with _quiet(datasets):
            found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        raise InputError(f"data folder {str(path)!r} could not be loaded ({error}): save the dataset again") from error
    if not isinstance(found, datasets.DatasetDict):
        return found
    if "train" not in found:
        raise InputError(f"dataset {str(path)!r} has no split train, only {', '.join(found)}: give one of its folders")
    return found["train"]
