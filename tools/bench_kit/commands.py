"""Whole commands in fresh processes, ours and Optimum's, on the files of one model: seconds and peak memory."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench_kit.results import ROOT, check_known, command_of, head, in_turn, keep, machine, parse

INTERVAL_S = 0.05  # between two looks at memory
INTEROP = ROOT / "tests" / "interop" / "interop_environment.py"
OPTIMUM = ("optimum-onnx", "optimum", "torch", "diffusers", "transformers", "onnx", "onnxruntime")
FAILED_CHECK = "the model was saved nonetheless"  # what Optimum says then, and exits with status 1
REFUSED = re.compile(r"^sdkd: (.+)\Z", re.M | re.S)  # what a command of ours ends with when it refuses or fails
FIGURES = ("seconds", "peak_rss_bytes", "peak_anonymous_bytes")
# In a child, so that this process stays small.
_SAVE = """
import sys
from pathlib import Path
from sdkd.models.diffusers_folder import write_pipeline
from sdkd.models.resolve import load_eager
write_pipeline(load_eager(sys.argv[1]), Path(sys.argv[2]))
"""
Variants = Mapping[str, tuple[str, ...]]
"""Words of commands by name; FOLDER stands for the model, OUT for the output, other capitals for options' values."""


@dataclass
class Measured:
    """All runs of one command (FIGURES, whether its check `passed`, or what it was `refused` with), and what its last
    run wrote.
    """

    runs: list[dict[str, Any]] = field(default_factory=list)
    written: dict[str, Any] = field(default_factory=dict)

    @property
    def refused(self) -> str:
        """What the command said where it refused or failed in any run; empty where it did its work."""
        return next((str(run["refused"]) for run in self.runs if "refused" in run), "")

    def figures(self) -> dict[str, Any]:
        """Medians, and the samples behind them."""
        samples = {name: [run[name] for run in self.runs] for name in FIGURES}
        return {**{name: statistics.median(values) for name, values in samples.items()}, "samples": samples}


def _look(root: psutil.Process, peaks: dict[str, int]) -> None:
    """Raise the peaks to what a process and its children hold now: Optimum checks graphs in a child.

    Pages of the weight files count as resident though they can go at any time; anonymous memory leaves them out. The
    kernel's own high-water mark (`ru_maxrss`) is not used: it begins with the size of the process that forked.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        rows = [_status(process.pid) for process in (root, *root.children(recursive=True))]
        marked = rows[0].get("VmHWM", 0)  # between two looks, too
        for name, size in (
            ("peak_rss_bytes", max(marked, sum(row.get("VmRSS", 0) for row in rows))),
            ("peak_anonymous_bytes", sum(row.get("RssAnon", 0) for row in rows)),
        ):
            peaks[name] = max(peaks[name], size)


def _status(pid: int) -> dict[str, int]:
    """Sizes in bytes that /proc gives for a process; empty when it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = [line.split() for line in lines if line.endswith(" kB")]
    return {name.rstrip(":"): int(value) * 1024 for name, value, _ in fields}


def run(command: list[str], log: Path) -> dict[str, Any]:
    """One command in a fresh process: what it took, or what it was refused with; SystemExit with the last words of one
    that fails otherwise.
    """
    os.sync()  # what an earlier run wrote must not be paid for by this one
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    peaks = dict.fromkeys(FIGURES[1:], 0)
    with log.open("w") as stream:
        start = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        try:
            watched = psutil.Process(process.pid)
            while process.poll() is None:
                _look(watched, peaks)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(INTERVAL_S)
        except BaseException:
            process.kill()
            raise
        seconds = time.perf_counter() - start
    status, said = process.returncode, log.read_text(errors="replace")
    if status == 1 and (refusal := REFUSED.search(said)):
        return {"seconds": seconds, **peaks, "passed": False, "refused": refusal[1].strip()}
    if (status and FAILED_CHECK not in said) or "newly initialized" in said:  # the latter: other weights than ours
        raise SystemExit(f"{said[-3000:]}\n{' '.join(command[:3])} ... failed with status {status}")
    return {"seconds": seconds, **peaks, "passed": status == 0}


def words_of(words: Sequence[str], folder: Path, output: Path, interop: Path | None) -> list[str]:
    """A command's words with its program's and the folders' places."""
    program, *rest = ({"FOLDER": str(folder), "OUT": str(output)}.get(word, word) for word in words)
    if program == "sdkd":
        return [sys.executable, "-m", "sdkd.cli", *rest]
    assert interop is not None
    return [str(interop.with_name(program)), *rest]


def measure(
    model: str,
    variants: Variants,
    rounds: int,
    interop: Path | None,
    describe: Callable[[Path], dict[str, Any]],
    refusals: bool,
) -> dict[str, Measured]:
    """Each variant once a round on the model's files; `describe` says what one wrote, which goes then.

    SystemExit for a command of ours that refuses or fails, unless `refusals` are results.
    """
    found = {name: Measured() for name in variants}
    place = ROOT / "artifacts"
    place.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix="bench-") as name:
        work = Path(name)
        folder, output = work / "model", work / "out"
        subprocess.run([sys.executable, "-c", _SAVE, model, str(folder)], check=True)
        for turn, variant in in_turn(list(variants), rounds):
            for file in folder.rglob("*.safetensors"):
                with file.open("rb") as stream:  # every run finds the weights in memory
                    while stream.read(1 << 24):
                        pass
            last = run(words_of(variants[variant], folder, output, interop), work / "log.txt")
            found[variant].runs.append(last)
            said = f"{last['seconds']:.1f} s, {last['peak_rss_bytes'] / 1e9:.2f} GB"
            said += f", refused: {last['refused']}" if "refused" in last else ""
            print(f"round {turn + 1} of {rounds}, {variant}: {said}", flush=True)
            if found[variant].refused and not refusals:
                raise SystemExit(f"{variant} failed: {found[variant].refused}")
            found[variant].written = describe(output)
            shutil.rmtree(output, ignore_errors=True)  # a command that refuses writes nothing
    return found


@dataclass(frozen=True)
class Costs:
    """A benchmark of commands: its option that chooses among `known`, defaults, and what makes rows and page.

    `words`: more options, whose values stand in the commands for their names in capitals. The result has one more,
    `result`, which names its files.
    """

    name: str  # of the result's files
    option: str
    known: Variants
    models: str
    rounds: int
    describe: Callable[[Path], dict[str, Any]]
    rows: Callable[[Mapping[str, Measured]], list[dict[str, Any]]]
    page: Callable[[Mapping[str, Any]], list[str]]
    words: Mapping[str, str] = field(default_factory=dict)
    refusals: bool = False  # whether a refusal is a result; else it ends the benchmark

    def main(self, about: str | None) -> None:
        """Parse, measure, write: after every model, so that what is done is kept."""
        every = ",".join(f'"{name}"' if "," in name else name for name in self.known)
        own = {self.option: every, **self.words, "result": self.name}
        asked = parse(about, models=self.models, rounds=self.rounds, **own)
        names = next(csv.reader([getattr(asked, self.option)]))
        check_known(self.option, names, self.known)
        values = {name: getattr(asked, name) for name in self.words}
        capitals = {name.upper(): value for name, value in values.items()}
        variants = {name: tuple(capitals.get(word, word) for word in self.known[name]) for name in names}
        interop = interop_python() if any(one[0] != "sdkd" for one in variants.values()) else None
        command = command_of(f"bench_{self.name}.py", asked, "models", "rounds", *own)
        models: list[dict[str, Any]] = []
        for model in asked.models.split(","):
            found = measure(model, variants, asked.rounds, interop, self.describe, self.refusals)
            models.append({"model": model, "rows": self.rows(found)})
            optimum = optimum_versions(interop) if interop else None
            result = head(command, rounds=asked.rounds, optimum=optimum, **values, models=models)
            keep(asked.output / machine() / f"{asked.result}.json", result, self.page(result))


def memory_cells(row: Mapping[str, Any]) -> list[str]:
    """Peak memory and the anonymous part of it, in GB."""
    return [f"{row[name] / 1e9:.2f}" for name in FIGURES[1:]]


def interop_python(*other: Path) -> Path:
    """Python of Optimum's environment, made when it is missing; of another, by its folder and its requirements."""
    command = [sys.executable, str(INTEROP), *map(str, other)]
    asked = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Path(asked.stdout.strip())


def optimum_versions(interop: Path, names: Sequence[str] = OPTIMUM) -> dict[str, str]:
    """Versions in Optimum's environment, or of other packages in another one."""
    code = f"from importlib.metadata import version; print(*(version(name) for name in {tuple(names)}))"
    asked = subprocess.run([interop, "-c", code], capture_output=True, text=True, check=True)
    return dict(zip(names, asked.stdout.split(), strict=True))
