"""Runs pieces of a benchmark, each in a process of its own, within a budget; keeps what was found after each.

A process that crashes or is stopped loses what it had not written yet, and no other piece.
Loads no torch: memory and GPU belong to the piece that runs.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_kit.record import Record
from bench_kit.results import ROOT
from sdkd.core.child import ended_by
from sdkd.core.files import read_json
from sdkd.errors import InputError

KEPT_LINES = 40
ROW_KEYS = ("what", "way", "batch", "size", "student", "model", "slot", "precision")  # rows equal in these are the same
CHILD = ("-m", "bench_kit.runner")  # what a Python runs a piece with
Json = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """One part of a benchmark: what runs it ("module:name", called with a Record and the arguments), and for how long.

    With less than `cost` seconds left it is not begun, after `cap` seconds it is stopped.
    """

    name: str
    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    cost: float = 0.0
    cap: float = float("inf")

    @property
    def kind(self) -> str:
        """What it measures, of whatever model: `eager` of `eager/tiny`."""
        return self.name.partition("/")[0]


@dataclass(frozen=True)
class Place:
    """Where pieces run: the folder of their files, their environment, and the program that gets two of the files."""

    work: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    program: Sequence[str] = (sys.executable, *CHILD)
    logged: bool = True  # what they print goes into a file of the folder, not to the terminal


def python_path(*folders: Path | None) -> dict[str, str]:
    """The environment of the pieces' processes, which find these folders, then the checkout and its tools."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    every = [*(str(folder) for folder in folders if folder), str(ROOT), str(ROOT / "tools"), *given]
    return {"PYTHONPATH": os.pathsep.join(one for one in every if one), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def to_run(pieces: Sequence[Piece], found: Mapping[str, Json], again: bool) -> list[Piece]:
    """What is not done: what was never begun first, then what ran out of time, then what failed; all for `again`."""
    ranks = {"": 0, "not started": 0, "out of budget": 1, "failed": 2}
    states = {piece.name: found.get(piece.name, {}).get("state", "") for piece in pieces}
    open_ones = [piece for piece in pieces if again or states[piece.name] != "done"]
    return sorted(open_ones, key=lambda piece: ranks.get(states[piece.name], 0))


def run_all(
    pieces: Sequence[Piece], place: Place, found: dict[str, Json], save: Callable[[], None], *, deadline: float,
    again: bool, said: Mapping[str, Any],
) -> None:  # fmt: skip
    """Run what is to be run until `deadline` (of time.monotonic), and `save` after each; what does not fit is left out.

    `said`: what every result says beside its own (commit, versions).
    """
    for piece in to_run(pieces, found, again):
        left, before = deadline - time.monotonic(), found.get(piece.name, {})
        if left < piece.cost:
            found.setdefault(piece.name, {"state": "not started", "rows": [], "facts": {}, "errors": {}})
            print(f"{piece.name}: not started, {left:.0f} s left of {piece.cost:.0f}", flush=True)
            continue
        print(f"{piece.name}: {left:.0f} s left", flush=True)
        result = run_one(piece, place, left)
        found[piece.name] = merged(before, {**result, **said})
        save()
        errors = "; ".join(f"{name}: {text}" for name, text in result["errors"].items())
        print(f"{piece.name}: {result['state']}, {result['wall_s']:.0f} s{', ' + errors if errors else ''}", flush=True)
    save()


def merged(before: Json, result: Json) -> Json:
    """A piece's new result with the earlier rows and facts that it did not find again, each row with its commit."""
    new = {_key(row) for row in result["rows"]}
    kept = [row for row in before.get("rows", ()) if _key(row) not in new]
    commit = before.get("commit")
    if commit and commit != result.get("commit"):
        kept = [{"commit": commit, **row} for row in kept]
    return {**result, "rows": [*result["rows"], *kept], "facts": {**before.get("facts", {}), **result["facts"]}}


def _key(row: Json) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ROW_KEYS)


def run_one(piece: Piece, place: Place, seconds: float = float("inf")) -> Json:
    """One piece's result, with its state: done, failed (with the error) or out of budget (with what it had by then)."""
    place.work.mkdir(parents=True, exist_ok=True)
    name = piece.name.replace("/", "-")
    given, result, log = (place.work / one for one in (f".{name}.piece.json", f".{name}.result.json", f"{name}.log"))
    for file in (result, log):
        file.unlink(missing_ok=True)
    given.write_text(json.dumps({"function": piece.function, "arguments": dict(piece.arguments)}))
    start, most = time.monotonic(), min(seconds, piece.cap)
    status = _wait([*place.program, str(given), str(result)], place.environment, log if place.logged else None, most)
    found: Json = {"rows": [], "facts": {}, "errors": {}, "tracebacks": {}}
    try:
        found |= read_json(result)
    except InputError:  # it ended before it had anything to say
        found["errors"]["process"] = ""
    if status is None:
        why = "the most for its kind" if most < seconds else "at the end of the budget"
        found["errors"]["process"] = f"stopped after {most:.0f} s, {why}"
    elif status:
        found["errors"]["process"] = ended(status, log)
    work = place.work
    found = scrubbed(found, {str(work.resolve()): "WORK", str(work): "WORK", str(ROOT): ".", str(Path.home()): "~"})
    state = "out of budget" if status is None else "failed" if _nothing(found) else "done"
    finished = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {**found, "state": state, "wall_s": round(time.monotonic() - start, 1), "finished_utc": finished}


def run_or_exit(piece: Piece, place: Place) -> Json:
    """One piece's result; SystemExit with all that went wrong, where anything did."""
    found = run_one(piece, place)
    if found["errors"]:
        traces = ["\n".join(lines) for lines in found["tracebacks"].values()]
        raise SystemExit("\n".join([*traces, *(f"error: {piece.name}: {text}" for text in found["errors"].values())]))
    return found


def _nothing(found: Json) -> bool:
    """Whether a piece ended by an error with no figure at all; a part may fail in a piece that is done."""
    measured = found["rows"] or "comparison" in found["facts"]
    return "process" in found["errors"] or (bool(found["errors"]) and not measured)


def scrubbed(value: Any, places: Mapping[str, str]) -> Any:
    """The same with other names for this machine's folders, the first of them first."""
    if isinstance(value, Mapping):
        return {key: scrubbed(each, places) for key, each in value.items()}
    if isinstance(value, list):
        return [scrubbed(each, places) for each in value]
    if isinstance(value, str):
        for place, name in places.items():
            value = value.replace(place, name) if len(place) > 1 else value
    return value


def ended(status: int, log: Path) -> str:
    """How a process ended, and the last that it printed."""
    how = f"ended {'by' if status < 0 else 'with'} {ended_by(status)}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return "\n".join([how, *lines[-KEPT_LINES:]])


def _wait(words: Sequence[str], environment: Mapping[str, str], log: Path | None, seconds: float) -> int | None:
    """The status of a process with all it started, None when it had to be stopped."""
    with (log or Path(os.devnull)).open("wb") as stream:
        out = stream if log else None
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env={**os.environ, **environment},
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(None if seconds == float("inf") else seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def child(piece: Path, result: Path) -> None:
    """In the piece's own process: run it, and write what it found after each row."""
    given, record = read_json(piece), Record(result)
    module, _, name = given["function"].partition(":")
    with record.part("piece"):
        getattr(importlib.import_module(module), name)(record, **given["arguments"])


if __name__ == "__main__":
    child(Path(sys.argv[1]), Path(sys.argv[2]))
