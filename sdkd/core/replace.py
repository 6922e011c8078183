"""Putting a new folder in the place of an old one in one step, and what a killed writer left. Standard library only.

Whoever writes under a temporary name holds a lock on it (flock, which ends with the process), so that nobody sweeps
away what is still being written.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_HERE = -100  # AT_FDCWD
# Where the system or the file system has no exchange.
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)
TEMPORARY = 40  # bytes that a temporary name may have more than the name it stands for
_LEFT = r"\.[0-9a-z_]{8}\.(partial|old)"


def temporary(path: Path, suffix: str) -> Path:
    """A fresh hidden name beside `path`."""
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.{suffix}"


def hold(descriptor: int) -> bool:
    """Lock an open file or folder for as long as it is open; False when another process has it, or it cannot be."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


@contextlib.contextmanager
def temporary_folder(path: Path, suffix: str = "partial") -> Iterator[Path]:
    """A new hidden folder beside `path`, held while it is used, gone afterwards."""
    folder = temporary(path, suffix)
    folder.mkdir()
    try:
        with _open(folder) as descriptor:
            hold(descriptor)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO of that name must not make us wait
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Have a file or folder on the disk."""
    with _open(path) as descriptor:
        os.fsync(descriptor)


def put(new: Path, place: Path) -> None:
    """Make the folder `new` the folder `place` in one step; what was there is then at `new`, or gone if it was empty.

    Without an exchange in the system there is a moment without `place`: `sweep` puts the old one back after a kill.
    """
    if not place.exists() or not any(place.iterdir()):
        new.rename(place)
    elif not _exchange(new, place):
        with temporary_folder(place, "old") as aside:
            place.rename(aside / "old")
            try:
                new.rename(place)
            except BaseException:
                (aside / "old").rename(place)
                raise
    with contextlib.suppress(OSError):  # some file systems cannot: then it is late, not lost
        sync(place.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at once; False where that is not possible here."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


def sweep(place: Path) -> None:
    """Remove what killed writers of `place` left beside it, and put an old one back that is there in no other form."""
    for left in leftovers(place.parent, re.escape(place.name)):
        with contextlib.suppress(OSError), _open(left) as descriptor:
            if not hold(descriptor):
                continue  # its writer lives
            if left.suffix == ".old" and (left / "old").exists() and not place.exists():
                (left / "old").rename(place)
            discard(left)


def leftovers(folder: Path, name: str = ".+") -> list[Path]:
    """Temporary files and folders in a folder, of names that match; some of them may still be written."""
    pattern = re.compile(rf"\.{name}{_LEFT}")
    try:
        return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
    except OSError:
        return []


def sweep_inside(folder: Path) -> None:
    """Remove what killed writers left directly in a folder."""
    for left in leftovers(folder):
        with contextlib.suppress(OSError), _open(left) as descriptor:
            if hold(descriptor):
                discard(left)


def discard(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it; what cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
