"""Engine files on their way into a bundle: a temporary folder, then names of their own, then the manifest."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from sdkd.bundle.manifest import Bundle, Manifest
from sdkd.core.replace import discard, sync

_BUILD = "build-"  # how the folders of later builds are called, below the slot's


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


def place_for(bundle: Bundle, slot: str, components: Iterable[str]) -> PurePosixPath:
    """Where new engine files of a slot go, below the bundle: into its folder, or, when one of the components has an
    engine there, into a new one below it. No name is used twice: whoever reads a manifest finds its files, or none.
    """
    plain = PurePosixPath("engines", slot)
    if not any(f"{slot}/{component}" in bundle.manifest.engines for component in components):
        return plain
    return plain / f"{_BUILD}{secrets.token_hex(4)}"


def _named(manifest: Manifest) -> set[str]:
    return {file.path for engine in manifest.engines.values() for file in engine.files}


@contextlib.contextmanager
def moved(partial: Path, home: Path) -> Iterator[None]:
    """Move all new files into their folder; when the body, which writes the manifest, fails, remove them."""
    names = [file.name for file in partial.iterdir() if file.suffix != ".lock"]
    try:
        home.mkdir(parents=True, exist_ok=True)
        for name in names:
            sync(partial / name)
            (partial / name).replace(home / name)
        sync(home)
        yield
    except BaseException:
        for name in names:
            if not (partial / name).exists():
                (home / name).unlink(missing_ok=True)
        _remove_empty(home)
        raise


def drop_replaced(before: Bundle, after: Bundle) -> None:
    """Remove the engine files that a manifest has named and no longer does. Who has just read the older manifest opens
    the bundle again (`engines.sessions.checks.of_newest`), and what is open stays so.
    """
    for path in _named(before.manifest) - _named(after.manifest):
        with contextlib.suppress(OSError):
            (before.path / path).unlink()
            _remove_empty((before.path / path).parent)


def drop_unnamed(bundle: Bundle, slot: str) -> None:
    """Remove folders of builds that were killed before the manifest named them, or after it named others."""
    used = {(bundle.path / path).parent for path in _named(bundle.manifest)}
    for left in (bundle.path / "engines" / slot).glob(_BUILD + "[0-9a-f]" * 8):
        if left not in used:
            discard(left)


def _remove_empty(folder: Path) -> None:
    if folder.name.startswith(_BUILD):
        with contextlib.suppress(OSError):
            folder.rmdir()
