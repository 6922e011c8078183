"""What a builder is told and what it answers: plain data that crosses the process border as JSON."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from export.build_options import GIB
from sdkd.console import Progress, quiet, within
from sdkd.contract import Contract
from sdkd.errors import BuildError
from sdkd.targets import check_target

# Each module has `flags(engine_precision, onnx_precision) -> dict` (cheap, for the parent) and
# `build(job, progress) -> Built` (for the child).
BUILDERS = {
    "onnxruntime": "export.build_onnxruntime",
    "openvino": "export.build_openvino",
    "tensorrt": "export.build_tensorrt",
    "tensorrt-rtx": "export.build_tensorrt",
}
GRAPH_BYTES = 2e7  # a graph costs time even without weights
Run = Callable[[Mapping[str, Any]], list[Any]]
"""Runs a saved engine: numpy arrays by input name -> numpy arrays in the contract's order of outputs."""


@dataclass(frozen=True)
class Job:
    """One engine to build: files, profiles (smallest, best, largest shape per input), and shapes to check it with."""

    component: str
    target: str
    precision: str
    onnx: str
    folder: str
    contract: Contract
    profiles: tuple[Mapping[str, Any], ...]  # each: input -> [min, opt, max] shapes
    checks: tuple[Mapping[str, int], ...]  # axis sizes, the best shape first
    flags: Mapping[str, Any] = field(default_factory=dict)
    timing_cache: str = ""  # a file's name in the folder; empty where the library keeps none

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_json` reads it back."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Job:
        """The inverse of `to_json`."""
        changed = {name: tuple(data[name]) for name in ("profiles", "checks")}
        return Job(**{**data, **changed, "contract": Contract.from_json(data["contract"])})

    def file(self, suffix: str) -> Path:
        """Where the builder writes, e.g. `<folder>/unet.engine`."""
        return Path(self.folder) / f"{self.component}{suffix}"

    def weight_bytes(self) -> int:
        """Size of the ONNX graph and its weights."""
        return sum(file.stat().st_size for file in Path(self.onnx).parent.glob("model.onnx*"))


@dataclass(frozen=True)
class Built:
    """What a builder made: file names in the job's folder (the engine first), what it found out, how to run it."""

    files: tuple[str, ...]
    flags: Mapping[str, Any] = field(default_factory=dict)
    built_for: tuple[str, ...] = ()
    run: Run | None = None  # None: cannot run where it was built


def build_all(jobs: list[dict[str, Any]], progress: Progress = quiet) -> list[dict[str, Any]]:
    """Build and check one engine after the other (called in the child process); one answer per job.

    Every progress message starts with the component's name, by which the parent knows what a crash hit.
    """
    cap_memory(jobs[0])
    answers = []
    sizes = [GRAPH_BYTES + Job.from_json(data).weight_bytes() for data in jobs]  # how the time is shared out
    for index, data in enumerate(jobs):
        done, total = sum(sizes[:index]), sum(sizes)
        part = within(progress, done / total, (done + sizes[index]) / total, f"{data['component']}: ")
        answers.append(_build_one(Job.from_json(data), part))
    return answers


def cap_memory(job: Mapping[str, Any]) -> None:
    """Let this process take no more memory than its options say; more is an error of whoever asks for it.

    Not where the library itself uses the GPU: there the drivers' reservations count, and the library has its own limit.
    """
    cap = job["flags"].get("options", {}).get("memory_cap_gb")
    if cap and not check_target(job["target"]).builds_on_gpu:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (int(cap * GIB), int(cap * GIB)))


def _build_one(job: Job, progress: Progress) -> dict[str, Any]:
    from export.build_parity import check_engine

    start = time.perf_counter()
    progress("starting", 0.0)
    share = 0.97 if check_target(job.target).runs_on_gpu else 0.8  # the rest is the comparison with the graph
    built: Built = importlib.import_module(BUILDERS[job.target]).build(job, within(progress, 0.0, share))
    missing = [name for name in built.files if not (Path(job.folder) / name).stat().st_size]
    if missing:
        raise BuildError(f"{job.component} for {job.target}: the builder wrote an empty file {missing[0]!r}")
    seconds = time.perf_counter() - start
    parity = check_engine(job, built.run, within(progress, share, 1.0)) if built.run else None
    progress("done", 1.0)
    return {
        "files": list(built.files),
        "flags": dict(built.flags),
        "built_for": list(built.built_for),
        "parity": parity,
        "seconds": round(seconds, 3),
    }


def check_io(job: Job, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
    """BuildError unless a graph's tensor names and dtypes (torch's names) are the contract's."""
    for kind, found, specs in (("input", inputs, job.contract.inputs), ("output", outputs, job.contract.outputs)):
        expected = {spec.name: spec.dtype for spec in specs}
        if dict(found) != expected:
            raise BuildError(
                f"{job.component} for {job.target}: the graph's {kind}s are {_listed(found)}, "
                f"the bundle's contract says {_listed(expected)}: export the model again"
            )


def _listed(tensors: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in tensors.items()) or "none"
