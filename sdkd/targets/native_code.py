"""Files that run as code when they are opened: only those that this user made or names are.

A bundle may come from anywhere, and its manifest finds damage, not malice. Whoever makes such a file notes its SHA-256
among the user's caches, and whoever opens one asks here first.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from sdkd.core.files import write_bytes
from sdkd.errors import EngineError
from sdkd.targets.registry import cache_folder

_SHA256 = re.compile("[0-9a-f]{64}")  # a manifest could name a path
VARIABLE = "SDKD_TRUSTED"  # SHA-256 of files that others made, with commas


def note(digests: Iterable[str]) -> None:
    """These files are this user's own work. A home that cannot be written keeps no notes, and opening says so."""
    with contextlib.suppress(OSError):
        for digest in digests:
            write_bytes(cache_folder() / "trusted" / digest, b"")


def check(what: str, digest: str, remake: str) -> None:
    """EngineError unless a file was made here, or its digest is in SDKD_TRUSTED.

    `what` names the file in the message, `remake` is how to make it again.
    """
    named = {one.strip() for one in os.environ.get(VARIABLE, "").split(",")}
    noted = bool(_SHA256.fullmatch(digest)) and (cache_folder() / "trusted" / digest).is_file()
    if noted or digest in named:
        return
    raise EngineError(
        f"{what} is code that would run with all your rights, and it was not made here by you: {remake}. "
        f"Where you trust whoever made it, say so: {VARIABLE}={digest}"
    )


def private_copy(file: Path, digest: str, folder: Path) -> Path:
    """A copy of a file in a folder of one's own, of exactly the bytes with this SHA-256; EngineError for others.

    Whoever can write into a bundle could put another file there between a look at it and its use.
    """
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise EngineError(f"{str(file)!r} was altered: its SHA-256 differs from the manifest's")
    copy = folder / file.name
    copy.write_bytes(data)
    return copy
