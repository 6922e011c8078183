"""Images of a whole file of prompts: a folder that fills, can be gone on with, and is training data like any other."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from sdkd.core.files import check_file_free, write_bytes
from sdkd.core.images import opened
from sdkd.core.marks import is_drawn_image
from sdkd.core.outputs import Input, check_filled, check_ours
from sdkd.errors import InputError, OutputExistsError

METADATA = "metadata.jsonl"
_NUMBERED = re.compile(r"\d{5,}\.png")


def image_files(folder: Path, count: int) -> list[Path]:
    """Where the images go: numbered from 00000."""
    return [folder / f"{index:05d}.png" for index in range(count)]


def missing(files: Sequence[Path], wanted: Sequence[Mapping[str, str]]) -> list[int]:
    """Which images are still to draw; OutputExistsError when one is there that was drawn from other settings."""
    return [index for index, file in enumerate(files) if not is_drawn(file, wanted[index])]


def is_drawn(file: Path, wanted: Mapping[str, str]) -> bool:
    """Whether an image is there already with the same settings in its PNG text; OutputExistsError if with others."""
    if not file.exists():
        return False
    if _settings(file) == dict(wanted):
        return True
    raise OutputExistsError(
        f"image {str(file)!r} is there and was drawn from other settings: choose another folder or pass --overwrite"
    )


def _settings(file: Path) -> dict[str, str]:
    try:
        with opened(file) as image:
            return {str(key): str(value) for key, value in getattr(image, "text", {}).items()}
    except InputError:  # whatever it is, it was not drawn by this
        return {}


def check_images(files: Sequence[Path], overwrite: bool, inputs: Sequence[Input], *, folder: bool) -> None:
    """InputError or OutputExistsError, before anything is loaded, where an image must not be written.

    A `folder` of a file of prompts fills beside what is in it; no image and no metadata.jsonl of others is replaced.
    """
    if not folder:
        for file in files:
            check_file_free(file, overwrite, inputs, ours=is_drawn_image)
        return
    for file in files:
        check_ours(file, is_drawn_image)
    check_filled(files[0].parent, [*(files if overwrite else ()), files[0].with_name(METADATA)], inputs)
    check_metadata(files[0].parent)


def check_metadata(folder: Path) -> None:
    """OutputExistsError when the metadata.jsonl in a folder holds captions of other images than `write_metadata`'s."""
    file = folder / METADATA
    if file.exists() and not all(_is_own(line, folder) for line in file.read_bytes().splitlines()):
        raise OutputExistsError(
            f"{str(file)!r} holds captions of other images, which would be lost: choose another folder"
        )


def _is_own(line: bytes, folder: Path) -> bool:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    if not isinstance(row, dict) or set(row) != {"file_name", "text"} or not _NUMBERED.fullmatch(str(row["file_name"])):
        return False
    image = folder / row["file_name"]
    return not image.exists() or is_drawn_image(image)


def write_metadata(files: Sequence[Path], captions: Sequence[str]) -> None:
    """`metadata.jsonl` of the images that are there, as `--data` and Hugging Face's image folders read it."""
    rows = [
        json.dumps({"file_name": file.name, "text": caption}, ensure_ascii=False)
        for file, caption in zip(files, captions, strict=True)
        if file.is_file()
    ]
    if rows:
        write_bytes(files[0].parent / METADATA, ("\n".join(rows) + "\n").encode())
