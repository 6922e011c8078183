"""Writing without losing: atomic files and folders, hashes and locks. Standard library only at import time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdkd.errors import BusyError, OutputExistsError
from sdkd.json_files import read_json as read_json

_CHUNK = 1 << 22


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: temporary name beside it, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON atomically; a NaN or infinity is refused (ValueError), since JSON has none."""
    write_bytes(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


def check_free(path: Path, overwrite: bool) -> None:
    """OutputExistsError when `path` is there (an empty folder does not count) and `overwrite` is false."""
    if overwrite or not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    raise OutputExistsError(f"output {str(path)!r} already exists: choose another folder or pass --overwrite")


@contextlib.contextmanager
def new_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` on success and vanishes on any failure.

    Raises OutputExistsError before any work when `path` is there and `overwrite` is false.
    """
    check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial"))
    partial.chmod(0o777 & ~_umask())
    try:
        yield partial
        _replace_folder(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace_folder(partial: Path, path: Path) -> None:
    for file in partial.rglob("*"):
        if file.is_file():
            _sync(file)
    if not path.exists():
        partial.rename(path)
        return
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
    path.rename(old / "old")
    try:
        partial.rename(path)
    except BaseException:
        (old / "old").rename(path)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def lock(path: Path, timeout: float = 0.0) -> Iterator[None]:
    """Hold the lock of an output folder, across processes; BusyError after `timeout` seconds of waiting."""
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    holder = FileLock(str(path.parent / f".{path.name}.lock"))
    try:
        holder.acquire(timeout=timeout)
    except Timeout:
        raise BusyError(
            f"output {str(path)!r} is being written by another process: wait for it, or choose another folder"
        ) from None
    try:
        yield
    finally:
        holder.release()
