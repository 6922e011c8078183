"""What one piece found so far: rows, facts and errors, written after each, so that a crash loses none."""

from __future__ import annotations

import contextlib
import math
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdkd.core.files import write_json

LAST = 30  # lines of a traceback


class Record:
    """The result of one piece; `part` turns an exception into a recorded error, and the next part goes on."""

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.rows: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}
        self.errors: dict[str, str] = {}
        self.tracebacks: dict[str, list[str]] = {}
        self._start = time.perf_counter()

    def row(self, **row: Any) -> None:
        """Add a row; what is not finite, which JSON cannot hold, becomes None."""
        self.rows.append(_finite(row))
        self.save()

    def fact(self, **facts: Any) -> None:
        """Add facts, as rows."""
        self.facts |= _finite(facts)
        self.save()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Part of a piece: what it raises is recorded under its name, in the error's own words, and goes no further."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever a library raises is a result
            self.errors[name] = f"{type(error).__name__}: {error}"
            lines = "".join(traceback.format_exception(error)).splitlines()
            self.tracebacks[name] = lines[-LAST:]
            traceback.clear_frames(error.__traceback__)
        self.save()

    @property
    def spent_s(self) -> float:
        """Seconds since the piece began."""
        return time.perf_counter() - self._start

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        found = {"rows": self.rows, "facts": self.facts, "errors": self.errors, "tracebacks": self.tracebacks}
        return {**found, "spent_s": round(self.spent_s, 2)}

    def save(self) -> None:
        """Write what there is, where a file was given."""
        if self.file is not None:
            write_json(self.file, self.to_json())


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
