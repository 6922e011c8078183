"""Writing without losing: atomic files and folders, hashes and locks. Standard library only at import time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from sdkd.core.documents import read_json
from sdkd.core.outputs import Input, check_file_free, check_free
from sdkd.core.replace import hold, put, sync, temporary, temporary_folder
from sdkd.errors import BusyError

__all__ = ["check_file_free", "check_free", "lock", "new_folder", "read_json"]
__all__ += ["sha256", "staged_folder", "write_bytes", "write_json"]

_CHUNK = 1 << 22


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def written(path: Path) -> Iterator[IO[bytes]]:
    """A stream into a file that is there whole or not at all: temporary name beside it, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = temporary(path, "partial")
    try:
        with name.open("xb") as stream:
            hold(stream.fileno())
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(name, path)
    except BaseException:
        name.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file as `written` does."""
    with written(path) as stream:
        stream.write(data)


def write_json(path: Path, data: object) -> None:
    """Write indented JSON atomically; a NaN or infinity is refused (ValueError), since JSON has none."""
    write_bytes(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


@contextlib.contextmanager
def new_folder(path: Path, overwrite: bool = False, inputs: Iterable[Input] = ()) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` on success and vanishes on any failure.

    Raises what `check_free` raises, before any work.
    """
    check_free(path, overwrite, inputs)
    with staged_folder(path) as partial:
        yield partial


@contextlib.contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """What `new_folder` does where it was checked already that `path` may be replaced."""
    place = Path(os.path.realpath(path))
    place.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(place) as partial:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file() and not file.is_symlink():
                sync(file)
        put(partial, place)


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock of an output folder, across processes; BusyError when another one has it."""
    from filelock import FileLock, Timeout

    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = FileLock(str(path.parent / f".{path.name}.lock"))
    try:
        holder.acquire(timeout=0)
    except Timeout:
        raise BusyError(
            f"output {str(path)!r} is being written by another process: wait for it, or choose another folder"
        ) from None
    try:
        yield
    finally:
        holder.release()
