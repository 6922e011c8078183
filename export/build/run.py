"""Building and checking engines one after the other, in the child process of a build."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from export.build.gate import OTHER, Floats, pays
from export.build.job import Built, Job
from export.build.options import GIB
from export.build.parity import check_engine
from export.build.quantized import ROUNDED, build_light, build_rounded
from sdkd.core.console import Progress, quiet, within
from sdkd.core.contract import DTYPES
from sdkd.errors import BuildError
from sdkd.quantization.again import CALIBRATION, QUANTIZATION
from sdkd.targets.registry import check_target, uses_gpu

# Each module has `flags(engine_precision, onnx_precision) -> dict` and `half_precision() -> str`, the fastest one of
# float engines here (both cheap, for the parent), and `build(job, progress) -> Built` (for the child). One that needs
# more of a component than its graph has `check(bundle, component)`, too (for the parent).
BUILDERS = {
    "onnxruntime": "export.build.onnxruntime_graph",
    "openvino": "export.build.openvino_blob",
    "tensorrt": "export.build.tensorrt_plan",
    "tensorrt-rtx": "export.build.tensorrt_plan",
    "inductor": "export.build.inductor_package",
}
GRAPH_BYTES = 2e7  # a graph costs time even without weights


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
    if cap and not uses_gpu(check_target(job["target"])):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (int(cap * GIB), int(cap * GIB)))


def _build_one(job: Job, progress: Progress) -> dict[str, Any]:
    start = time.perf_counter()
    progress("starting", 0.0)
    kind = check_target(job.target)
    share = 0.97 if kind.runs_on_gpu or kind.either else 0.8  # the rest is the comparison with the graph
    with _scratch(Path(job.folder)):
        built, found = _built(job, within(progress, 0.0, share))
        missing = [name for name in built.files if not (Path(job.folder) / name).stat().st_size]
        if missing:
            raise BuildError(f"{job.component} for {job.target}: the builder wrote an empty file {missing[0]!r}")
        seconds = time.perf_counter() - start
        parity = found.pop("parity", None)
        if built.run and parity is None:
            parity = check_engine(job, built.run, within(progress, share, 1.0), built.reference)
    progress("done", 1.0)
    return {
        "files": list(built.files),
        "precision": found.pop("precision", job.precision),
        "flags": {**built.flags, **found},
        "built_for": list(built.built_for),
        "parity": parity,
        "seconds": round(seconds, 3),
        "kept": job.keep_slower or pays(found),
    }


def _built(job: Job, progress: Progress) -> tuple[Built, dict[str, Any]]:
    """The engine, and what was found out about one of eight bits."""
    builder = importlib.import_module(BUILDERS[job.target])
    rounded = job.flags.get(QUANTIZATION)
    if rounded is None:
        return builder.build(job, progress), {}
    if CALIBRATION in rounded:
        return build_rounded(job, builder.build, _floats(builder), progress)
    return build_light(job, builder.build, _floats(builder), progress)


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[None]:
    """Remove what an engine of eight bits is built from, and compared with, when it is done."""
    try:
        yield
    finally:
        for name in (ROUNDED, OTHER):
            shutil.rmtree(folder / name, ignore_errors=True)


def _floats(builder: Any) -> Floats:
    """Builds a job's engine in its target's half precision, which it notes in the flags, into a folder."""

    def build(job: Job, folder: Path) -> Built:
        half: str = builder.half_precision()
        graph = next(name for name, dtype in DTYPES.items() if dtype == job.contract.outputs[0].dtype)
        flags = {key: value for key, value in job.flags.items() if key == "options"} | builder.flags(half, graph)
        folder.mkdir(exist_ok=True)
        built: Built = builder.build(replace(job, precision=half, flags=flags, folder=str(folder)), quiet)
        return replace(built, flags={**built.flags, "precision": half})

    return build
