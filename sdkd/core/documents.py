"""Reading JSON that may be damaged or made to harm: one error that names the file and the key."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from sdkd.core.schema import problem
from sdkd.errors import InputError

_LARGEST = 1 << 28  # bytes


def read_regular(path: Path, largest: float = _LARGEST) -> bytes:
    """A file's bytes; InputError when it is missing, too large, or no regular file: reading a FIFO never ends."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise InputError(f"file {str(path)!r} does not exist") from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{str(path)!r} is no regular file: restore it or make it again")
    if found.st_size > largest:
        raise InputError(f"file {str(path)!r} has {found.st_size} bytes, at most {largest} are read: make it again")
    return path.read_bytes()


def read_json(path: Path, shape: Any = Any, *, strict: bool = False) -> Any:
    """Parse a JSON file; InputError, which names file and key, when it is missing, not JSON or not of the shape.

    `shape`: a type, as `sdkd.core.schema.problem` reads it. `strict`, for what sdkd wrote: no key twice, no NaN.
    """
    try:
        return parse_json(read_regular(path), shape, strict=strict)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"file {str(path)!r} {error}: restore it or make it again") from None


def parse_json(data: bytes, shape: Any = Any, *, strict: bool = False) -> Any:
    """As `read_json`, of bytes: ValueError says what is the matter with "the file", as the rest of a sentence."""
    options: dict[str, Any] = {"object_pairs_hook": _unique, "parse_constant": _no_constant} if strict else {}
    try:
        found = json.loads(data.decode("utf-8-sig"), **options)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error})") from None
    except RecursionError:
        raise ValueError("is damaged (its lists and objects are nested too deeply)") from None
    except ValueError as error:  # ours, and that of a number with thousands of digits
        raise ValueError(f"is damaged ({error})") from None
    if wrong := problem(found, shape):
        raise ValueError(f"is damaged ({wrong})")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {max(names, key=names.count)!r} is there twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
