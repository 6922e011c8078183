"""The guard of outputs: what may be written where, said before any work. Standard library only.

An output is replaced only when that was asked for and sdkd wrote what is there, and never when it has anything to do
with an input of the same command. A folder of ours that holds files of others, too, is not replaced either: nobody can
know whether these would be missed, and moving them aside would leave them where nobody looks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from sdkd.core.marks import Kind, damaged_mark, foreign, kind_of, proves
from sdkd.core.replace import TEMPORARY, sweep, sweep_inside
from sdkd.errors import InputError, OutputExistsError

Input = str | os.PathLike[str] | None
"""A model, data, prompts, ... as given: what names no file or folder here (a hub id, a text) is passed over."""

_NAME = 255  # bytes of a file's name, where the system does not say
_PATH = 4000  # bytes of a path, some fewer than Linux takes


def check_free(path: str | os.PathLike[str], overwrite: bool, inputs: Iterable[Input] = ()) -> None:
    """An output folder that is written as a whole: OutputExistsError or InputError where it must not be.

    Not when it is there (an empty folder does not count), unless `overwrite` was asked for and sdkd wrote all that is
    in it; not where it is, holds or lies in an input; not where no folder can be put in its place.
    """
    place = check_place(path, inputs)
    if not place.exists() or not any(place.iterdir()):
        return
    if reason := why_kept(place):
        raise OutputExistsError(f"output {str(path)!r} already exists, and {reason}: choose another folder")
    if not overwrite:
        raise OutputExistsError(f"output {str(path)!r} already exists: choose another folder or pass --overwrite")


def why_kept(folder: Path) -> str | None:
    """Why a folder that is there must not be replaced, in words; None when sdkd wrote all that is in it."""
    kind = kind_of(folder)
    if kind is None and (name := damaged_mark(folder)):
        return f"its {name} is damaged or another program's, so that only you can say whether to remove it"
    if kind is None:
        return "sdkd did not write what is in it"
    name = foreign(folder, kind)
    return None if name is None else f"holds {name!r} beside the {kind.name} that sdkd wrote there"


def check_parts_free(
    folder: str | os.PathLike[str], kind: Kind, parts: Sequence[str], overwrite: bool, inputs: Iterable[Input] = ()
) -> None:
    """Parts of a folder that are replaced beside files of others: as `check_free`, for these names alone."""
    place = check_place(folder, inputs, filled=True)
    there = [name for name in parts if os.path.lexists(place / name)]
    for name in there:
        for given, source in existing(inputs):
            if word := _relation(Path(os.path.realpath(place / name)), source):
                raise InputError(f"output {str(folder)!r}: its {name} {word} the input {given!r}: give another")
    if not there:
        return
    if not proves(place, kind) or foreign(place, kind, parts):
        raise OutputExistsError(
            f"output {str(folder)!r} already holds {there[0]}, which sdkd did not write: choose another folder"
        )
    if not overwrite:
        raise OutputExistsError(
            f"output {str(folder)!r} already holds {there[0]}: choose another folder or pass --overwrite"
        )


def check_filled(folder: str | os.PathLike[str], files: Iterable[Path], inputs: Iterable[Input] = ()) -> None:
    """A folder into which files are put beside others: InputError where it cannot be, or where a file is an input."""
    place = check_place(folder, inputs, filled=True)
    names = {place / file.name for file in files}
    for given, source in existing(inputs):
        if source in names:
            raise InputError(f"output {str(source)!r} is the input {given!r}: give another folder")
    sweep_inside(place)


def check_place(path: str | os.PathLike[str], inputs: Iterable[Input] = (), *, filled: bool = False) -> Path:
    """The real path of an output folder; InputError where a folder cannot be written or put in the place of another.

    `filled`: files are put into the folder one by one, beside others: it may hold inputs, and be a mount point.
    """
    place = _real(path)
    if place.exists() and not place.is_dir():
        raise InputError(f"output {str(path)!r} is a file, and a folder is to be written: give another name")
    if not filled:
        _check_replaceable(path, place)
    for given, source in existing(inputs):
        word = _relation(place, source)
        if word and not (filled and word == "holds"):
            raise InputError(f"output {str(path)!r} {word} the input {given!r}: give a folder of its own")
    _check_writable(place if filled and place.is_dir() else place.parent)
    if not filled:
        sweep(place)
    return place


def check_file_free(
    path: str | os.PathLike[str],
    overwrite: bool,
    inputs: Iterable[Input] = (),
    *,
    ours: Callable[[Path], bool] = lambda file: False,
) -> None:
    """An output file: InputError when it is an input or cannot be written, OutputExistsError when it is there, unless
    `overwrite` was asked for and the file is `ours`. An existing file that lies in an input folder counts as an input.
    """
    place = _real(path)
    if place.is_dir():
        raise InputError(f"output {str(path)!r} is a folder, and a file is to be written: give a file's name")
    if place.exists() and not place.is_file():
        raise InputError(f"output {str(path)!r} is no regular file: give a file's name")
    for given, source in existing(inputs):
        if place.exists() and (source in place.parents or place.samefile(source)):
            word = "lies in" if source in place.parents else "is"
            raise InputError(f"output {str(path)!r} {word} the input {given!r}: give another name")
    check_ours(path, ours)
    if place.exists() and not overwrite:
        raise OutputExistsError(f"output {str(path)!r} already exists: choose another name or pass --overwrite")
    _check_writable(place.parent)
    sweep(place)


def check_ours(path: str | os.PathLike[str], ours: Callable[[Path], bool]) -> None:
    """OutputExistsError where a file is there that is not `ours`."""
    if Path(path).is_file() and not ours(Path(path)):
        raise OutputExistsError(f"output {str(path)!r} already exists, and sdkd did not write it: choose another name")


def existing(inputs: Iterable[Input]) -> Iterator[tuple[str, Path]]:
    """Each input that is a file or folder here: as given, and its real path."""
    for given in inputs:
        if given is None or str(given) in ("", "demo"):  # the embedded model, whatever else is called so
            continue
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # too long, or no path at all
            path = Path(os.path.realpath(Path(given).expanduser()))
            if path.exists():  # a pipe's real path is none
                yield str(given), path


def _relation(place: Path, source: Path) -> str:
    """How an output's place is related to an input's, or nothing."""
    if place == source or (place.exists() and place.samefile(source)):
        return "is"
    if place in source.parents:
        return "holds"
    return "lies in" if source in place.parents else ""


def _real(path: str | os.PathLike[str]) -> Path:
    """The path with its links resolved; InputError for a name that is too long and for a link to nowhere."""
    whole = Path(os.path.abspath(path))  # noqa: PTH100 - links are looked at below
    longest = _longest(whole.parent) - TEMPORARY
    if len(os.fsencode(whole.name)) > longest or len(os.fsencode(whole)) > _PATH:
        shown = f"{whole.name[:40]}..."
        raise InputError(f"output {shown!r} has too long a name: give one of at most {longest} bytes")
    try:
        if os.path.lexists(whole) and not whole.exists():
            to = str(whole.readlink())
            raise InputError(f"output {str(path)!r} is a link to {to!r}, which is not there: remove it")
        for above in whole.parents:
            if above.exists() and not above.is_dir():
                raise InputError(f"output {str(path)!r} lies below {str(above)!r}, which is a file: give another name")
    except PermissionError:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(whole.parent)) from None
    return Path(os.path.realpath(whole))


def _longest(folder: Path) -> int:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return int(os.pathconf(nearest(folder), "PC_NAME_MAX"))
    return _NAME


def nearest(folder: Path) -> Path:
    """The folder itself, or the first one above it that is there."""
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def is_replaceable(path: str | os.PathLike[str]) -> bool:
    """Whether another folder could be put in the place of this one, whatever is in it."""
    try:
        _check_replaceable(path, _real(path))
    except InputError:
        return False
    return True


def _check_replaceable(path: str | os.PathLike[str], place: Path) -> None:
    """InputError for folders in whose place nothing can be put: the working and the home folder, mount points."""
    if not place.exists():
        return
    known = [("the folder that you are in", _found(Path.cwd)), ("your home folder", _found(Path.home))]
    for name, found in [*known, *(("a mount point", mount) for mount in _mounts(place))]:
        if found is not None and (place == found or place in found.parents):
            word = "is" if place == found else "holds"
            raise InputError(
                f"output {str(path)!r} {word} {name}, which cannot be replaced: give a folder of its own, such as "
                f"{str(place / 'out')!r}"
            )


def _found(find: Callable[[], Path]) -> Path | None:
    try:
        return Path(os.path.realpath(find()))
    except (OSError, RuntimeError):  # it was removed, or there is none
        return None


def _mounts(place: Path) -> list[Path]:
    try:
        rows = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return [place] if os.path.ismount(place) else []
    names = (row.split()[4].decode(errors="surrogateescape") for row in rows)
    return [Path(name.replace("\\040", " ")) for name in names]


def _check_writable(folder: Path) -> None:
    """OSError, now instead of after the work, where nothing can be made in a folder or the first one there above it."""
    found = nearest(folder)
    try:
        Path(tempfile.mkdtemp(dir=found, prefix=".sdkd.", suffix=".partial")).rmdir()
    except OSError as error:  # of /proc it is said that it does not exist
        number = errno.EACCES if error.errno in (errno.ENOENT, errno.EPERM) else error.errno or errno.EACCES
        raise OSError(number, os.strerror(number), str(found)) from None
