"""Runs the pieces of a report, each in a process of its own, within a budget; keeps what was found after each.

A process that crashes or is stopped loses what it had not written yet, and no other piece.
Loads no torch: a GPU belongs to the piece that runs.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gpu_bench.settings import Piece, Settings, cap, cost
from sdkd.core.files import read_json
from sdkd.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "gpu_report.py"
KEPT_LINES = 40
ROW_KEYS = ("what", "way", "batch", "size", "student", "component", "precision")  # rows equal in these are the same
Json = dict[str, Any]
Save = Callable[[], None]
Command = Callable[[Piece, Path, Path], Sequence[str]]
"""The words that run a piece, given the files of its settings and its result."""


def command(piece: Piece, settings: Path, result: Path) -> list[str]:
    """The report's own script, in the same Python."""
    return [sys.executable, str(SCRIPT), "--child", piece.name, str(settings), str(result)]


def to_run(pieces: Sequence[Piece], found: Mapping[str, Json], again: bool) -> list[Piece]:
    """What is not done: what was never begun first, then what ran out of time, then what failed; all for `again`."""
    ranks = {"": 0, "not started": 0, "not installed": 0, "out of budget": 1, "failed": 2}
    states = {piece.name: found.get(piece.name, {}).get("state", "") for piece in pieces}
    open_ones = [piece for piece in pieces if again or states[piece.name] != "done"]
    return sorted(open_ones, key=lambda piece: ranks.get(states[piece.name], 0))


def run_all(
    pieces: Sequence[Piece], settings: Settings, found: dict[str, Json], save: Save, *, deadline: float, again: bool,
    said: Mapping[str, Any], environment: Mapping[str, str], missing: Mapping[str, str] = MappingProxyType({}),
    words: Command = command,
) -> None:  # fmt: skip
    """Run what is to be run until `deadline` (of time.monotonic), and `save` after each; what does not fit is left out.

    `said`: what every result says beside its own (commit, versions). `environment`: of the processes. `missing`: kinds
    whose package is not there, and why; no process is started for them.
    """
    for piece in to_run(pieces, found, again):
        left, before = deadline - time.monotonic(), found.get(piece.name, {})
        needed = cost(piece.kind, settings)
        if piece.kind in missing or left < needed:
            state = "not installed" if piece.kind in missing else "not started"
            why = {"package": missing[piece.kind]} if piece.kind in missing else {}
            if not before or (why and not before["rows"]):
                found[piece.name] = {"state": state, "rows": [], "facts": {}, "errors": why}
            print(f"{piece.name}: {state}, {why.get('package', f'{left:.0f} s left of {needed:.0f}')}", flush=True)
            continue
        print(f"{piece.name}: {left:.0f} s left", flush=True)
        result = run_one(piece, settings, left, environment, words)
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


def run_one(piece: Piece, settings: Settings, seconds: float, environment: Mapping[str, str], words: Command) -> Json:
    """One piece's result, with its state: done, failed (with the error) or out of budget (with what it had by then)."""
    work = Path(settings.work)
    work.mkdir(parents=True, exist_ok=True)
    files = [work / f".{piece.name.replace('/', '-')}.{name}.json" for name in ("settings", "result")]
    for file in files:
        file.unlink(missing_ok=True)
    files[0].write_text(json.dumps(settings.to_json()))
    start, log = time.monotonic(), work / f"{piece.name.replace('/', '-')}.log"
    most = min(seconds, cap(piece.kind))
    status = _wait(words(piece, *files), environment, log, most)
    found: Json = {"rows": [], "facts": {}, "errors": {}, "tracebacks": {}}
    try:
        found |= read_json(files[1])
    except InputError:  # it ended before it had anything to say
        found["errors"]["process"] = ""
    if status is None:
        why = "the most for its kind" if most < seconds else "at the end of the budget"
        found["errors"]["process"] = f"stopped after {most:.0f} s, {why}"
    elif status:
        found["errors"]["process"] = ended(status, log)
    found = scrubbed(found, {str(work.resolve()): "WORK", str(work): "WORK", str(ROOT): ".", str(Path.home()): "~"})
    state = "out of budget" if status is None else "failed" if _nothing(found) else "done"
    finished = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {**found, "state": state, "wall_s": round(time.monotonic() - start, 1), "finished_utc": finished}


def _nothing(found: Json) -> bool:
    """Whether a piece ended by an error with no figure at all; one of several ways may fail in a piece that is done."""
    return "process" in found["errors"] or (bool(found["errors"]) and not found["rows"])


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
    how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return "\n".join([how, *lines[-KEPT_LINES:]])


def _wait(words: Sequence[str], environment: Mapping[str, str], log: Path, seconds: float) -> int | None:
    """The status of a process with all it started, None when it had to be stopped."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env={**os.environ, **environment},
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def child(name: str, settings_file: Path, result: Path) -> None:
    """In the piece's own process: run it, and write what it found after each row."""
    from gpu_bench.record import Record
    from gpu_bench.settings import all_pieces

    settings = Settings.from_json(read_json(settings_file))
    piece = next(one for one in all_pieces(settings) if one.name == name)
    record = Record(result)
    run_piece(piece, settings, record)
    record.save()


def run_piece(piece: Piece, settings: Settings, record: Any) -> None:
    """Call a piece's function in this process; what it raises is recorded as an error of the piece."""
    import importlib

    from gpu_bench.device import Device, clocks

    module, _, name = piece.function.partition(":")
    function = getattr(importlib.import_module(f"gpu_bench.{module}"), name)
    extra = {"target": piece.kind} if name == "engine" else {}
    record.fact(clocks_before=clocks())
    device = Device(settings)
    with record.part("piece"):
        function(settings, device, record, piece.model, **extra)
    record.fact(clocks_under_load=device.clocks, clocks_after=clocks())
