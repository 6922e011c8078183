"""Whole commands in fresh processes, ours and Optimum's, on the files of one model: seconds and peak memory."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench_kit.results import ROOT, in_turn

SAMPLES_PER_SECOND = 20
INTEROP = ROOT / "tests" / "interop" / "interop_environment.py"
FAILED_CHECK = "the model was saved nonetheless"  # what Optimum says then, and exits with status 1
# In a child, so that this process stays small.
_SAVE = """
import sys
from pathlib import Path
from sdkd.models.diffusers_folder import write_pipeline
from sdkd.models.resolve import load_eager
write_pipeline(load_eager(sys.argv[1]), Path(sys.argv[2]))
"""
Variants = Mapping[str, tuple[str, ...]]
"""Words of commands by name; FOLDER stands for the model, OUT for the output."""


@dataclass
class Run:
    """What one command took: seconds, the highest memory of its processes together, and whether its check passed."""

    seconds: float
    peak_rss: int
    peak_anonymous: int
    passed: bool


@dataclass
class Measured:
    """All runs of one command, and what its last run wrote."""

    runs: list[Run] = field(default_factory=list)
    written: dict[str, Any] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """Medians, and the samples behind them."""
        samples = {
            "seconds": [run.seconds for run in self.runs],
            "peak_rss_bytes": [run.peak_rss for run in self.runs],
            "peak_anonymous_bytes": [run.peak_anonymous for run in self.runs],
        }
        return {**{name: statistics.median(values) for name, values in samples.items()}, "samples": samples}


class Memory(threading.Thread):
    """Watches a process and its children, since Optimum checks graphs in a child.

    Pages of the weight files count as resident though they can go at any time; anonymous memory leaves them out. The
    kernel's own high-water mark (`ru_maxrss`) is not used: it begins with the size of the process that forked.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.root = psutil.Process(pid)
        self.done = threading.Event()
        self.peak_rss = self.peak_anonymous = 0

    def run(self) -> None:
        """Sample until told to stop."""
        while not self.done.wait(1 / SAMPLES_PER_SECOND):
            with contextlib.suppress(psutil.NoSuchProcess):
                rows = [_status(process.pid) for process in (self.root, *self.root.children(recursive=True))]
                marked = _status(self.root.pid).get("VmHWM", 0)  # between two samples, too
                self.peak_rss = max(self.peak_rss, marked, sum(row.get("VmRSS", 0) for row in rows))
                self.peak_anonymous = max(self.peak_anonymous, sum(row.get("RssAnon", 0) for row in rows))


def _status(pid: int) -> dict[str, int]:
    """Sizes in bytes that /proc gives for a process; empty when it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = [line.split() for line in lines if line.endswith(" kB")]
    return {name.rstrip(":"): int(value) * 1024 for name, value, _ in fields}


def run(command: list[str], log: Path) -> Run:
    """One command in a fresh process; SystemExit with its last words when it fails."""
    os.sync()  # what an earlier run wrote must not be paid for by this one
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as stream:
        start = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        memory = Memory(process.pid)
        memory.start()
        try:
            status = process.wait()
        except BaseException:
            process.kill()
            raise
        seconds = time.perf_counter() - start
    memory.done.set()
    memory.join()
    said = log.read_text(errors="replace")
    if (status and FAILED_CHECK not in said) or "newly initialized" in said:  # the latter: other weights than ours
        raise SystemExit(f"{said[-3000:]}\n{' '.join(command[:3])} ... failed with status {status}")
    return Run(seconds, memory.peak_rss, memory.peak_anonymous, status == 0)


def words_of(words: Sequence[str], folder: Path, output: Path, interop: Path | None) -> list[str]:
    """A command's words with its program's and the folders' places."""
    program, *rest = ({"FOLDER": str(folder), "OUT": str(output)}.get(word, word) for word in words)
    if program == "sdkd":
        return [sys.executable, "-m", "sdkd.cli", *rest]
    assert interop is not None
    return [str(interop.with_name(program)), *rest]


def measure(
    model: str, variants: Variants, rounds: int, interop: Path | None, describe: Callable[[Path], dict[str, Any]]
) -> dict[str, Measured]:
    """Each variant once a round on the model's files; `describe` says what one wrote, which goes then."""
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
            found[variant].written = describe(output)
            shutil.rmtree(output)
            said = f"{last.seconds:.1f} s, {last.peak_rss / 1e9:.2f} GB"
            print(f"round {turn + 1} of {rounds}, {variant}: {said}", flush=True)
    return found


def chosen(parser: argparse.ArgumentParser, what: str, names: Sequence[str], known: Variants) -> Variants:
    """The variants of these names; the parser's error for an unknown one."""
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{what} {unknown[0]!r} is unknown: choose from {', '.join(map(repr, known))}")
    return {name: known[name] for name in names}


def interop_python() -> Path:
    """Python of Optimum's environment, made when it is missing."""
    asked = subprocess.run([sys.executable, str(INTEROP)], stdout=subprocess.PIPE, text=True, check=True)
    return Path(asked.stdout.strip())


def optimum_versions(interop: Path) -> dict[str, str]:
    """Versions in Optimum's environment."""
    names = ("optimum-onnx", "optimum", "torch", "diffusers", "transformers", "onnx", "onnxruntime")
    code = f"from importlib.metadata import version; print(*(version(name) for name in {names}))"
    asked = subprocess.run([interop, "-c", code], capture_output=True, text=True, check=True)
    return dict(zip(names, asked.stdout.split(), strict=True))
