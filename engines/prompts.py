"""Images of a whole file of prompts: a folder that fills, can be gone on with, and is training data like any other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from sdkd.errors import InputError, OutputExistsError
from sdkd.files import write_bytes
from sdkd.images import opened

METADATA = "metadata.jsonl"


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


def write_metadata(files: Sequence[Path], captions: Sequence[str]) -> None:
    """`metadata.jsonl` of the images that are there, as `--data` and Hugging Face's image folders read it."""
    rows = [
        json.dumps({"file_name": file.name, "text": caption}, ensure_ascii=False)
        for file, caption in zip(files, captions, strict=True)
        if file.is_file()
    ]
    if rows:
        write_bytes(files[0].parent / METADATA, ("\n".join(rows) + "\n").encode())
