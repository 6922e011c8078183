"""`sdkd doctor`: what this machine can build and run, and what to install."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from sdkd import __version__
from sdkd.core.console import Progress, progress, quiet, show, show_json, styled, table, within
from sdkd.errors import MissingExtraError
from sdkd.targets.fast_precisions import TENSOR_CORES, Fast, cpu_precisions_fast, gpu_precisions_fast, weight_bits
from sdkd.targets.gpu_generations import ROWS, generation, parse
from sdkd.targets.gpu_trial import Support, Trial, attempt, identity, plans, remember, remembered, support
from sdkd.targets.nvidia import cuda_packages, driver_cuda, driver_version, gpu
from sdkd.targets.registry import (
    TARGETS,
    Availability,
    availability,
    cpu_flags,
    cpu_name,
    extra_of,
    installed_version,
    overlay,
    packages_of,
    removal,
    require,
)

LIBRARIES = (
    "torch", "diffusers", "transformers", "accelerate", "peft", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu",
    "onnxruntime-ep-nv-tensorrt-rtx-cu13", "openvino", "tensorrt", "tensorrt_rtx", "polygraphy", "nvidia-ml-py",
)  # fmt: skip


def examine() -> dict[str, Any]:
    """Everything doctor knows, JSON-ready: machine, GPU, libraries and one row per target."""
    import psutil

    memory = psutil.virtual_memory()
    return {
        "sdkd": __version__,
        "machine": {
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "python": platform.python_version(),
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "memory_gib": round(memory.total / 2**30, 1),
            "free_memory_gib": round(memory.available / 2**30, 1),
        },
        "gpu": _gpu(),
        "precisions": precisions(),
        "libraries": {name: installed_version(name) for name in LIBRARIES},
        "onnxruntime_providers": _providers(),
        "onnxruntime_on_gpu": providers_on_gpu(),
        "packages": package_problems(),
        "targets": [asdict(availability(name)) for name in TARGETS],
        "gpu_targets": gpu_rows(),
        "gpu_support": [asdict(one) for one in gpu_support()],
    }


def precisions(capability: str = "") -> dict[str, Any]:
    """Which precisions are fast on the CPU and on the GPU that is here, or on one of that capability; and why."""
    flags, capability = cpu_flags(), capability or _capability_here()
    return {
        "cpu": [asdict(row) for row in cpu_precisions_fast(flags)],
        "gpu": [asdict(row) for row in gpu_precisions_fast(capability)] if capability else None,
        "int8_weight_bits": weight_bits(flags),
    }


def _capability_here() -> str:
    """The compute capability of the GPU that is here; empty without one."""
    device = gpu()
    return device["compute_capability"] if device else ""


def gpu_targets() -> list[str]:
    """The targets that run on GPUs alone."""
    return [name for name, target in TARGETS.items() if target.runs_on_gpu]


def gpu_support(capability: str = "") -> list[Support]:
    """What is known and what was measured of each installed GPU target on this GPU, or on one of that capability."""
    here, found = _capability_here(), list[Support]()
    for name in gpu_targets() if capability or here else ():
        with contextlib.suppress(MissingExtraError):
            trials = remembered(name) if (capability or here) == here else ()
            found.append(support(name, capability or here, trials))
    return found


def gpu_rows(capability: str = "") -> list[dict[str, Any]]:
    """Which targets are made for the GPU that is here, or for those of a compute capability, and who says so."""
    asked = capability or _capability_here()
    return [
        {
            "target": row.target,
            "way": row.way,
            "compute_capability": asked,
            "runs": row.runs_on(asked),
            "gpus": row.words,
            "source": row.source,
        }
        for row in (ROWS if asked else ())
    ]


def try_target(target: str, progress: Progress = quiet) -> list[Trial]:
    """Build, open and run a small engine of a target in child processes, and remember the answers for this GPU."""
    from sdkd.core.child import ChildError, run_in_child

    trials, names = [], plans(target)
    for index, plan in enumerate(names):
        part = within(progress, index / len(names), (index + 1) / len(names), f"{target}, {plan}: ")
        asked = {"target": target, "plan": plan}
        try:
            trials.append(Trial(**run_in_child(f"{attempt.__module__}:attempt", asked, part)))
        except ChildError as error:  # the library crashed
            said = " ".join([str(error), *error.tail[-4:]])
            here: dict[str, Any] = dict(identity(target))
            trials.append(Trial(target, plan, "crash", said, **here))
    remember(trials)
    return trials


def _gpu() -> dict[str, Any]:
    """The device as torch sees it, the driver and its CUDA; None for what is not there."""
    import torch

    device = gpu()
    runs = driver_cuda()
    memory = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if device else None
    packages = {name: major for target in TARGETS.values() for name, major in cuda_packages(target.module).items()}
    return {
        "gpu": device["gpu"] if device else None,
        "compute_capability": device["compute_capability"] if device else None,
        "memory_gib": memory,
        "driver": driver_version(),
        "driver_cuda": f"{runs[0]}.{runs[1]}" if runs else None,
        "torch_cuda": torch.version.cuda,
        "packages_cuda": packages,
    }


def _providers() -> list[str]:
    try:
        listed = require("onnxruntime").get_available_providers()
    except MissingExtraError:
        return []
    return [name.removesuffix("ExecutionProvider") for name in listed]


def providers_on_gpu() -> dict[str, str | None]:
    """Of each provider of ONNX Runtime for a GPU why it does not run on the one that is here; None where it does.

    Empty without a GPU, or without an onnxruntime to ask.
    """
    from sdkd.targets.ort_providers import ON_GPU, provider_problem

    return {name: provider_problem(name) for name in ON_GPU} if gpu() and _providers() else {}


def package_problems() -> list[dict[str, str]]:
    """Targets whose module several installed packages have, which lie over one another, and how to mend it."""
    found = []
    for target in (one for one in TARGETS.values() if one.gpu_extra):
        if reason := overlay(packages := packages_of(target)):
            fix = f"{removal(packages)}, then pip install 'sdkd[{extra_of(target)}]'"
            found.append({"target": target.name, "reason": reason, "fix": fix})
    return found


def _yes(value: bool) -> Any:
    return styled("yes", "green") if value else "no"


def _facts(found: dict[str, Any], details: bool) -> list[list[Any]]:
    rows = [[key.replace("_", " "), value] for key, value in found["machine"].items()]
    for key, value in found["gpu"].items():
        text = ", ".join(f"{name}: {major}" for name, major in value.items()) if isinstance(value, dict) else value
        if details or key in ("gpu", "driver") or value:
            rows.append([key.replace("_", " ").replace("cuda", "CUDA"), text or "none"])
    fast = found["precisions"]
    rows += [[f"fast on the {name.upper()}", _fast(fast[name])] for name in ("cpu", "gpu") if fast[name]]
    return [*rows, ["onnxruntime for", ", ".join(found["onnxruntime_providers"]) or "nothing"]]


def _fast(rows: Sequence[dict[str, Any]]) -> str:
    """The precisions that a device is fast in, on a CPU each with the unit that makes it so."""
    fast = [row for row in (Fast(**row) for row in rows) if row.fast]
    return ", ".join(
        row.precision if row.unit in ("", TENSOR_CORES) else f"{row.precision} ({row.unit})" for row in fast
    )


def _precision_table(found: dict[str, Any]) -> Any:
    rows = [
        [name.upper(), row.precision, _yes(row.fast), row.unit or "-", row.why]
        for name in ("cpu", "gpu")
        for row in (Fast(**each) for each in found["precisions"][name] or ())
    ]
    return table("Precisions", ["on", "precision", "fast", "unit", "why"], rows)


def doctor(
    details: Annotated[bool, typer.Option("--details", help="Show every library and precision, too.")] = False,
    try_gpu: Annotated[
        bool, typer.Option("--try", help="Build, open and run a small engine of each GPU target; remembers the answer.")
    ] = False,
    capability: Annotated[
        str, typer.Option("--gpu", help="Say what is known of another GPU, by compute capability: 9.0.")
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what this machine can build and run, and what to install."""
    if capability:
        parse(capability)
    trials = _try_all() if try_gpu else []
    found = examine()
    if capability:
        found["gpu_targets"] = gpu_rows(capability)
        found["gpu_support"] = [asdict(one) for one in gpu_support(capability)]
        found["precisions"] = precisions(capability)
    if try_gpu:
        found["trials"] = [asdict(trial) for trial in trials]
    if json:
        show_json(found)
        return
    show(table("Machine", ["", ""], _facts(found, details)))
    if details:
        libraries = [[name, version or "not installed"] for name, version in found["libraries"].items()]
        show(table("Libraries", ["", "version"], libraries), _precision_table(found))
    targets = [Availability(**row) for row in found["targets"]]
    rows = [
        [one.target, (one.version or "-").partition("-")[0] or "-", _yes(one.can_build), _yes(one.can_run), one.reason]
        for one in targets
    ]
    show(table("Targets", ["target", "version", "builds here", "runs here", "why"], rows))
    _show_generation(found["gpu_targets"])
    _show_support([Support(**row) for row in found["gpu_support"]], trials)
    for one in targets:
        if one.fix:
            show(f"  {one.target}: {one.fix}")
    for row in found["packages"]:
        show(f"  {row['target']}: {row['reason']}: {row['fix']}")
    for name, problem in found["onnxruntime_on_gpu"].items():
        show(f"  onnxruntime by {name}: {problem or 'runs on this GPU'}")


def _try_all() -> list[Trial]:
    """A trial of every GPU target whose library is installed."""
    names = [name for name in gpu_targets() if availability(name).version]
    trials: list[Trial] = []
    with progress("doctor") as report:
        for index, name in enumerate(names):
            trials += try_target(name, within(report, index / len(names), (index + 1) / len(names)))
    return trials


def _show_generation(rows: Sequence[dict[str, Any]]) -> None:
    """Which targets a GPU has, one row each."""
    if rows:
        shown = [[_way(row), _yes(row["runs"]), row["gpus"], row["source"]] for row in rows]
        title = f"Compute capability {generation(rows[0]['compute_capability'])}"
        show(table(title, ["target", "made for it", "made for", "by"], shown))


def _way(row: dict[str, Any]) -> str:
    return f"{row['target']}, {row['way']}" if row["way"] else str(row["target"])


def _show_support(found: Sequence[Support], trials: Sequence[Trial]) -> None:
    """What is known and what was measured of GPU targets; what was tried where there is no GPU to remember it for."""
    for one in found:
        known = f"{one.target} on compute capability {one.compute_capability}: {one.known}."
        show(known, f"  {one.measured[0].upper()}{one.measured[1:]}.")
    for trial in trials if not found else ():
        show(f"{trial.target}: {trial.words()}")
