"""What can be built and run here: one row per target, found by looking, never guessed from version numbers."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from sdkd.core.contract import ENGINE_PRECISIONS
from sdkd.errors import InputError, MissingExtraError
from sdkd.targets.nvidia import cuda_packages, driver_cuda, driver_version, gpu, gpu_problem

CPUINFO = Path("/proc/cpuinfo")
CPU_UNITS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "sve", "asimd")  # in the kernel's words, the widest first


@dataclass(frozen=True)
class Target:
    """One kind of engine: its Python module, the extra that installs it, and what it needs."""

    name: str
    module: str
    extra: str
    purpose: str
    suffix: str  # of an engine file
    precision: str  # by default
    builds_on_gpu: bool = False
    runs_on_gpu: bool = False
    many_profiles: bool = False  # whether an engine is tuned for several ranges of shapes; otherwise one covers them
    # TensorRT networks are strongly typed and onnxruntime runs the graph as it is: there the graph itself must be
    # exported in the wanted precision. OpenVINO lowers an fp32 graph by itself.
    exported_in: str | None = None  # what graphs are exported in, whatever the engines' precision
    converts: tuple[tuple[str, tuple[str, ...]], ...] = ()  # (a graph's precision, other precisions of its engines)
    quantizes: tuple[str, ...] = ()  # engines of eight bits, made from a graph of the default precision
    takes_bf16: bool = True  # onnxruntime has no bf16 kernels for a CPU (Conv, ...): nobody could check them
    either: bool = False  # built for the GPU that torch sees, where there is one, else for the CPU
    without_weights: bool = False  # its engines are code alone, and take their weights from the exported graph
    missing: str = ""  # names a function that says what a build lacks here beside the module, and what to do
    gpu_extra: str = ""  # the extra that installs it beside an NVIDIA driver, where that is another one


_TENSORRT: dict[str, Any] = {"suffix": ".engine", "precision": "fp16", "runs_on_gpu": True, "many_profiles": True}
_TENSORRT |= {"quantizes": ("int8", "fp8")}
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            *("onnxruntime", "onnxruntime", "cpu", "runs anywhere", ".onnx", "fp32"),
            takes_bf16=False,
            quantizes=("int8",),
            gpu_extra="gpu",
        ),
        Target(
            *("openvino", "openvino", "openvino", "fastest on a CPU", ".blob", "fp32"),
            exported_in="fp32",
            converts=(("fp32", ("bf16", "fp16")), ("fp16", ("fp32",))),
            takes_bf16=False,
            quantizes=("int8",),
        ),
        Target("tensorrt", "tensorrt", "tensorrt", "fastest on NVIDIA GPUs", builds_on_gpu=True, **_TENSORRT),
        Target("tensorrt-rtx", "tensorrt_rtx", "tensorrt-rtx", "built anywhere, runs on RTX GPUs", **_TENSORRT),
        Target(
            *("inductor", "torch", "", "PyTorch's own compiler: any NVIDIA GPU, or a CPU", ".pt2", "fp32"),
            many_profiles=True,
            either=True,
            without_weights=True,
            missing="sdkd.targets.inductor:missing",
        ),
    )
}


@dataclass(frozen=True)
class Availability:
    """Whether a target can be built and run on this machine, and what to do if not."""

    target: str
    version: str | None
    can_build: bool
    can_run: bool
    reason: str
    fix: str


def check_target(name: str) -> Target:
    """The target of a name or slot (`openvino-bf16` -> openvino); InputError lists the choices."""
    for suffix in ("", *(f"-{precision}" for precision in ENGINE_PRECISIONS)):
        base = name.removesuffix(suffix) if suffix else name
        if base in TARGETS:
            return TARGETS[base]
    raise InputError(f"target {name!r} is unknown: choose one of {', '.join(TARGETS)}")


def slot_precision(slot: str) -> str | None:
    """The precision that a slot names (`openvino-bf16` -> bf16), None for a plain target; InputError if unknown."""
    return slot.removeprefix(check_target(slot).name).removeprefix("-") or None


def slot_name(target: str, engine_precision: str, onnx_precision: str) -> str:
    """Where an engine is kept in a bundle: the target, with its precision when that is not the ONNX's."""
    return target if engine_precision == onnx_precision else f"{target}-{engine_precision}"


def extra_of(target: Target) -> str:
    """The extra of sdkd that installs a target's module on this machine; empty where sdkd itself needs the module."""
    return target.gpu_extra if target.gpu_extra and driver_version() else target.extra


def require(target: str, purpose: str = "") -> ModuleType:
    """Import a target's module; MissingExtraError names the pip command, and what to remove before.

    `purpose`: what it is needed for, where that is not the target itself.
    """
    found = check_target(target)
    problem = package_problem(found)
    try:
        if problem is None:
            return importlib.import_module(found.module)
    except ImportError as error:
        raise _missing(found, purpose) from error
    raise _missing(found, purpose, *problem)


def _missing(target: Target, purpose: str, *problem: str) -> MissingExtraError:
    extra = extra_of(target) or target.name
    return MissingExtraError(target.module, extra, purpose or f"target {target.name!r}", *problem)


def package_problem(target: Target) -> tuple[str, str] | None:
    """Why a target's module is not whole, and the command that removes what is left of it; None where it is.

    Several packages that have the same module write over one another's files; whichever is removed then takes the
    others' files along, and what stays is a folder that imports as an empty module.
    """
    spec = importlib.util.find_spec(target.module)
    if spec is not None and spec.origin is not None:
        return None
    if packages := packages_of(target):
        return "has lost files, since another package of the same module was removed", removal(packages)
    return "is not installed", ""


def packages_of(target: Target) -> list[str]:
    """The installed packages that a target's module belongs to; more than one lie over one another."""
    return sorted(set(importlib.metadata.packages_distributions().get(target.module, ())))


def overlay(packages: Sequence[str]) -> str:
    """What is said of several packages with one module; empty for one or none."""
    return f"{' and '.join(packages)} lie over one another" if len(packages) > 1 else ""


def removal(packages: Iterable[str]) -> str:
    """The command that removes packages."""
    return f"pip uninstall -y {' '.join(packages)}"


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, None when it is not there."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def cache_folder() -> Path:
    """Where this user's caches are: $XDG_CACHE_HOME/sdkd, or ~/.cache/sdkd.

    What a library reads back as native data is kept here, never in a bundle, which may come from anywhere.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdkd"


def uses_gpu(target: Target) -> bool:
    """Whether a target's engines are built for and on the GPU that is here."""
    return target.builds_on_gpu or (target.either and gpu() is not None)


def runs_on_gpu(target: Target) -> bool:
    """Whether a target's engines run on a GPU: always, or here, where there is one."""
    return target.runs_on_gpu or uses_gpu(target)


def usual_precision(target: Target) -> str:
    """The precision of a target's engines that people want here: half on a GPU."""
    return "fp16" if target.either and gpu() is not None else target.precision


def timing_cache(target: str) -> str:
    """Name of the file in `cache_folder` with what a library timed: one per GPU, driver and version of the library.

    Empty where there is nothing to keep: tensorrt_rtx times nothing when it builds, other targets neither.
    """
    found = check_target(target)
    if not found.builds_on_gpu or (device := gpu()) is None:
        return ""
    version = installed_version(found.module) or str(require(found.name).__version__)
    name = "-".join((device["gpu"], driver_version() or "driver", found.module, version))
    return f"timing-{re.sub(r'[^a-z0-9.]+', '-', name.lower())}.cache"


def cpu_name(cpuinfo: Path = CPUINFO) -> str:
    """Model name of the CPU, as the system states it, and its widest units: "AMD EPYC (avx512_bf16)".

    Virtual machines hide the model's number, so that the name alone may be that of very different CPUs.
    """
    fields = _cpu_fields(cpuinfo)
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = _flags(fields)
    widest = next((unit for unit in CPU_UNITS if unit in flags), "")
    return f"{name} ({widest})" if widest else name


def cpu_flags() -> set[str]:
    """What the CPU's cores can do, in the kernel's words; empty where it does not say."""
    return _flags(_cpu_fields(CPUINFO))


def _flags(fields: Mapping[str, str]) -> set[str]:
    return set(fields.get("flags", fields.get("Features", "")).split())  # on x86, on ARM


def _cpu_fields(cpuinfo: Path) -> dict[str, str]:
    """The kernel's description of the last core; nothing on other systems than Linux."""
    try:
        text = cpuinfo.read_text(encoding="utf-8")
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def environment(target: str) -> dict[str, str]:
    """What must be equal where an engine is built and where it runs; MissingExtraError without the module.

    An ahead-of-time engine (tensorrt-rtx) is not tied to a GPU model: its list of compute capabilities is checked.
    """
    found = check_target(target)
    module = require(target)
    result = {found.module: str(module.__version__), "platform": f"{platform.system().lower()}-{platform.machine()}"}
    device = gpu() if found.runs_on_gpu or found.either else None
    if found.either:
        result["device"] = "cuda" if device else "cpu"
    if found.name == "openvino" or (found.either and not device):
        result["cpu"] = cpu_name()
    if found.either and not device:  # native code uses every unit of the CPU that it is made on
        result["cpu_units"] = hashlib.sha256(" ".join(sorted(cpu_flags())).encode()).hexdigest()[:12]
    if device:
        result |= device if uses_gpu(found) else {"compute_capability": device["compute_capability"]}
    return result


def built_environment(target: str) -> dict[str, str]:
    """The part of `environment` that an engine built now must record."""
    now = environment(target)
    if not uses_gpu(check_target(target)):
        now.pop("compute_capability", None)  # built for a list of GPU generations instead
    return now


def availability(target: str) -> Availability:
    """Look whether a target builds and runs here; never raises for a known target."""
    found = check_target(target)
    extra = extra_of(found)
    fix = f"pip install 'sdkd[{extra}]'" if extra else "pip install sdkd"
    problem, first = package_problem(found) or ("", "")
    version = None if problem else _version(found)
    if version is None:
        reason = f"{found.module} {problem or 'is not installed'}"
        return Availability(found.name, None, False, False, reason, f"{first}, then {fix}" if first else fix)
    if found.runs_on_gpu and importlib.util.find_spec("polygraphy") is None:
        return Availability(found.name, version, False, gpu() is not None, "polygraphy is not installed", fix)
    if found.missing and (lacks := pkgutil.resolve_name(found.missing)()):
        return Availability(found.name, version, False, True, *lacks)
    if not found.runs_on_gpu or gpu():
        return Availability(found.name, version, True, True, "ready", "")
    import torch

    reason, fix = gpu_problem(driver_version(), driver_cuda(), cuda_packages(found.module), torch.version.cuda)
    return Availability(found.name, version, not found.builds_on_gpu, False, reason, fix)


def _version(target: Target) -> str | None:
    try:
        return str(getattr(importlib.import_module(target.module), "__version__", "unknown"))
    except ImportError:
        return None


def cpu_precisions() -> frozenset[str]:
    """Precisions that OpenVINO has units for on this CPU: some of fp32, fp16 and bf16."""
    found = openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return frozenset(name.lower() for name in found) & {"fp32", "fp16", "bf16"}


@functools.cache
def openvino_core() -> Any:
    """The `openvino.Core` of this process: one, never closed.

    On a CPU with AMX the plugin of each Core takes over the thread's alternate signal stack, and the last of two to go
    leaves it pointing at freed memory (seen with 2026.4): the next signal, Ctrl-C for one, ends the process by SIGSEGV.
    """
    import openvino

    return openvino.Core()
