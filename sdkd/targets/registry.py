"""What can be built and run here: one row per target, found by looking, never guessed from version numbers."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from sdkd.core.contract import ENGINE_PRECISIONS
from sdkd.errors import InputError, MissingExtraError

CPUINFO = Path("/proc/cpuinfo")
CPU_UNITS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "sve", "asimd")  # in the kernel's words, the widest first
DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}  # the oldest for Linux, by major version of CUDA
DRIVER_FILES = ("/sys/module/nvidia/version", "/proc/driver/nvidia/version")


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


_TENSORRT: dict[str, Any] = {"suffix": ".engine", "precision": "fp16", "runs_on_gpu": True, "many_profiles": True}
_TENSORRT |= {"quantizes": ("int8", "fp8")}
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "onnxruntime", "onnxruntime", "", "runs anywhere", ".onnx", "fp32", takes_bf16=False, quantizes=("int8",)
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


def require(target: str) -> ModuleType:
    """Import a target's module; MissingExtraError names the pip command."""
    found = check_target(target)
    try:
        return importlib.import_module(found.module)
    except ImportError as error:
        raise MissingExtraError(found.module, found.extra or found.name, f"target {found.name!r}") from error


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, None when it is not there."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu() -> dict[str, str] | None:
    """Name and compute capability of the first CUDA device that torch sees, None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return {"gpu": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}"}


def driver_version() -> str | None:
    """Version of the NVIDIA kernel driver, such as `580.65.06`; None where none is loaded."""
    for path in map(Path, DRIVER_FILES):
        try:
            if found := re.search(r"\b\d+\.\d+(\.\d+)?\b", path.read_text(encoding="utf-8")):
                return found[0]
        except OSError:
            continue
    try:  # where the driver is the host's (WSL)
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # noqa: BLE001 - pynvml has an exception type of its own for every failure, and may be missing
        return None


def driver_cuda() -> tuple[int, int] | None:
    """The version of CUDA that the NVIDIA driver runs, by the driver itself; None without one."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return version.value // 1000, version.value % 1000 // 10


def cuda_packages(distribution: str) -> dict[str, int]:
    """Installed packages of a library that were made for one major version of CUDA: {"tensorrt_cu13": 13}."""
    found = {}
    for one in importlib.metadata.distributions():
        name = (one.metadata["Name"] or "").lower().replace("-", "_")
        if match := re.fullmatch(rf"{distribution}_cu(\d+)", name):
            found[name] = int(match[1])
    return found


def gpu_problem(
    driver: str | None, runs: tuple[int, int] | None, needs: Mapping[str, int], torch_cuda: str | None
) -> tuple[str, str]:
    """Why no GPU is seen, and what to do.

    `driver`: its version; `runs`: the CUDA that it runs; `needs`: major version of CUDA by installed package;
    `torch_cuda`: the CUDA that torch was built with.
    """
    wanted = max([*needs.values(), int((torch_cuda or "0").partition(".")[0])], default=0)
    oldest = DRIVERS.get(wanted, DRIVERS[max(DRIVERS)])
    if driver is None and runs is None:
        return "no NVIDIA driver here", f"on a machine with an NVIDIA GPU, install its driver, {oldest} or later"
    if runs is None:
        return f"NVIDIA driver {driver} without libcuda.so.1", "install the driver's user part (libcuda.so.1), too"
    version = f"NVIDIA driver {driver or 'of unknown version'} runs CUDA {runs[0]}.{runs[1]}"
    for name, major in {**needs, **({f"torch for CUDA {torch_cuda}": wanted} if torch_cuda else {})}.items():
        if major > runs[0]:
            older = f", or: pip install {name.replace(f'cu{major}', f'cu{runs[0]}')}" if name in needs else ""
            return f"{version}, and {name} needs CUDA {major}", f"update the driver to {DRIVERS[major]} or later{older}"
    if torch_cuda is None:
        return (
            f"{version}, but this torch is built without CUDA",
            "install torch with CUDA (pytorch.org has the command)",
        )
    return f"{version}, and torch sees no device", "see what nvidia-smi says, and CUDA_VISIBLE_DEVICES"


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
    version = _version(found)
    if version is None:
        fix = f"pip install 'sdkd[{found.extra}]'" if found.extra else "pip install sdkd"
        return Availability(found.name, None, False, False, f"{found.module} is not installed", fix)
    if found.runs_on_gpu and importlib.util.find_spec("polygraphy") is None:
        fix = f"pip install 'sdkd[{found.extra}]'"
        return Availability(found.name, version, False, gpu() is not None, "polygraphy is not installed", fix)
    if found.missing and (lacks := pkgutil.resolve_name(found.missing)()):
        return Availability(found.name, version, False, True, *lacks)
    if not found.runs_on_gpu or gpu():
        return Availability(found.name, version, True, True, "ready", "")
    import torch

    reason, fix = gpu_problem(driver_version(), driver_cuda(), cuda_packages(found.module), torch.version.cuda)
    return Availability(found.name, version, not found.builds_on_gpu, False, reason, fix)


def _version(target: Target) -> str | None:
    if importlib.util.find_spec(target.module) is None:
        return None
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
