"""A row of captioned images: what every source of them offers, and what its caption is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from sdkd.core.text_files import clean
from sdkd.errors import InputError

CAPTION_COLUMNS = ("text", "caption", "prompt")


def split_columns(text: str) -> tuple[str, ...]:
    """Names of columns, separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def check_columns(names: Sequence[str]) -> None:
    """InputError when no column of captions is named."""
    if not names:
        raise InputError("no caption columns were given: name at least one, such as --caption-columns text")


class CaptionedImages(Protocol):
    """What the trainer learns from: rows {"image": PIL image, "caption": str} by index, such as a list or a Dataset.

    A source may also offer `caption(index)` and `image_size(index)` -> (width, height), both without decoding pixels,
    and `blocks`, ranges of indices that are best read together. InputError: this row cannot be read.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


def caption_at(images: CaptionedImages, index: int) -> str:
    """Caption of one image; of a source that does not offer captions alone, the whole row is read."""
    quick = getattr(images, "caption", None)
    return str(quick(index)) if quick else row_caption(images[index], index)


def row_caption(row: Mapping[str, Any], index: int) -> str:
    """The caption of a row {"image", "caption"}; InputError when it is None, which is not the empty caption."""
    found = caption_of(row, ("caption",))
    if found is None:
        raise InputError(f"image {index} has no caption: add it ('' for none), or remove the image")
    return found


def caption_of(row: Mapping[str, Any], columns: Sequence[str]) -> str | None:
    """The text in the first of the columns that the row has (of a list of texts the first one); None without one.

    Numbers are text, too, but not NaN or infinity, which tables write where nothing is.
    """
    for name in columns:
        value = row.get(name)
        if isinstance(value, list | tuple):
            value = value[0] if value else None
        if isinstance(value, str):
            return clean(value).removeprefix("\ufeff")
        if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
            return str(value)
    return None
