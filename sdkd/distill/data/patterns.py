"""Names of many files in one: patterns of tar shards and parquet files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from sdkd.errors import InputError

_PATTERN = re.compile(r"[*?\[{]")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def matching(pattern: str) -> list[Path]:
    """The .tar or .parquet files of a path or of a pattern with *, ? and {00..99}; InputError when one is missing."""
    found: list[Path] = []
    for name in _braces(pattern):
        path = Path(name).expanduser()
        if _PATTERN.search(name):
            folder = Path(path.anchor or ".")
            matches = folder.glob(str(path.relative_to(path.anchor) if path.anchor else path))
            found += sorted(match for match in matches if not match.name.startswith("._"))  # of macOS
        elif path.suffix in (".tar", ".parquet"):
            if not path.is_file():
                raise InputError(f"data file {name!r} does not exist: restore it, or correct the name or pattern")
            found.append(path)
    if _PATTERN.search(pattern) and not found:
        raise InputError(f"data pattern {pattern!r} matches no file: correct it; it may hold *, ? and {{00..99}}")
    if other := [path for path in found if path.suffix not in (".tar", ".parquet")]:
        raise InputError(f"data file {str(other[0])!r} is neither .tar nor .parquet: unpack it, or correct the pattern")
    return found


def _braces(pattern: str) -> Iterator[str]:
    """`a{00..02}` -> a00, a01, a02; `{x,y}` -> x, y, as a shell does."""
    before, opened, rest = pattern.partition("{")
    inside, closed, after = rest.partition("}")
    if not (opened and closed):
        yield pattern
        return
    if numbers := _RANGE.fullmatch(inside):
        low, high = numbers.groups()
        choices = [f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)]
    else:
        choices = inside.split(",")
    for choice in choices:
        yield from _braces(before + choice + after)
