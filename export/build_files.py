"""Engine files on their way into a bundle: a temporary folder, then all of them at once or none."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def partial_folder(home: Path) -> Iterator[Path]:
    """A temporary folder beside a slot's folder, gone whatever happens. The caller holds the lock."""
    home.parent.mkdir(parents=True, exist_ok=True)
    for left in home.parent.glob(".*.partial"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(dir=home.parent, prefix=f".{home.name}.", suffix=".partial"))
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in (home, home.parent):
            with contextlib.suppress(OSError):  # not empty, or not there
                folder.rmdir()


@contextlib.contextmanager
def moved(partial: Path, home: Path) -> Iterator[None]:
    """Move all new files into a slot's folder; when the body fails, put the old ones back."""
    names = [file.name for file in partial.iterdir() if file.suffix != ".lock"]
    old = partial / "old"
    old.mkdir()
    home.mkdir(exist_ok=True)
    try:
        for name in names:
            _sync(partial / name)
            if (home / name).exists():
                os.replace(home / name, old / name)
            os.replace(partial / name, home / name)
        yield
    except BaseException:
        for name in names:
            if not (partial / name).exists():
                (home / name).unlink(missing_ok=True)
            if (old / name).exists():
                os.replace(old / name, home / name)
        raise


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
