"""A result: what was asked for, where and when it was measured, the files that keep it."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from sdkd.compare.measure.stats import speedup
from sdkd.core.files import write_bytes, write_json

ROOT = Path(__file__).resolve().parents[2]
NONE = "–"


def parse(words: str | None, **defaults: Any) -> argparse.Namespace:
    """A benchmark's command line: an option for every default, of its type, and `--output`."""
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {**defaults, "output": ROOT / "benchmarks"}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default: {value}")
    return parser.parse_args()


def command_of(script: str, asked: argparse.Namespace, *names: str) -> str:
    """The command that measures the same again, with these options spelled out."""
    options = [f"--{name.replace('_', '-')} {shlex.quote(str(getattr(asked, name)))}" for name in names]
    return " ".join([f"python tools/{script}", *options])


def check_known(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    """SystemExit for a name that is not known, or cannot be had here."""
    if unknown := [name for name in names if name not in (every := list(known))]:
        choices = ", ".join(map(repr, every))
        raise SystemExit(f"error: {what} {unknown[0]!r} is unknown, or cannot run here: choose from {choices}")


def slug(name: str) -> str:
    """A folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def machine() -> str:
    """A folder name for this machine: its GPU, else its CPU and core count."""
    from sdkd.targets.nvidia import gpu
    from sdkd.targets.registry import cpu_name

    device = gpu()
    return slug(device["gpu"] if device else f"{cpu_name()} {os.cpu_count()} cores")


def commit() -> str:
    """The commit that is measured; `unknown` for a copy without its history."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def today() -> str:
    """The date of a result."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


def head(command: str, device: str = "cpu", **more: Any) -> dict[str, Any]:
    """What every result begins with. It loads torch: call it after memory was measured."""
    from sdkd.compare.measure.environment import environment

    made = {"machine": machine(), "date": today(), "commit": commit(), "command": command}
    return {"schema": 1, **made, **more, "environment": environment(device)}


def keep(path: Path, found: Mapping[str, Any], lines: Sequence[str]) -> None:
    """Write a result and, beside it, its page; SystemExit for one that bears a path of this machine."""
    text = json.dumps(found)
    leaks = [str(place) for place in (ROOT, Path.home(), tempfile.gettempdir()) if str(place) in text]
    if leaks:
        raise SystemExit(f"the result holds paths of this machine ({', '.join(leaks)}): it was not written")
    write_json(path, found)
    page = [*lines, "", "Made again by:", "", f"    {found['command']}", ""]
    write_bytes(path.with_suffix(".md"), "\n".join(page).encode())


def span(values: Sequence[float], form: str, joint: str = "–") -> str:
    """The mean, and the range where there are several."""
    spread = f" ({min(values):{form}}{joint}{max(values):{form}})" if len(values) > 1 else ""
    return f"{mean(values):{form}}{spread}"


def in_turn(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Round and name: every name once a round, in rotating order, so that drift of the machine hits all alike."""
    for turn in range(rounds):
        first = turn % len(names)
        yield from ((turn, name) for name in (*names[first:], *names[:first]))


def faster(base: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> list[float] | None:
    """How many times faster `other` is, with its 95 % interval over paired rounds; None for fewer than three."""
    ratio = speedup(base, other)
    return [ratio.value, ratio.low, ratio.high] if ratio else None


def ratio_cell(ratio: Sequence[float | None] | None) -> str:
    """A ratio and its interval, if there is one, for a table."""
    if not ratio or ratio[0] is None:
        return NONE
    return "{:.2f}x ({:.2f} to {:.2f})".format(*ratio) if len(ratio) > 1 else f"{ratio[0]:.2f}x"
