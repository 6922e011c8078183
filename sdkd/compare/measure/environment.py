"""Where a measurement was made: hardware, load, versions, attention kernel, and the memory of this process."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sdkd.targets.nvidia import gpu
from sdkd.targets.registry import TARGETS, availability, cpu_flags, cpu_name, installed_version

LIBRARIES = ("torch", "triton", "diffusers", "transformers", "accelerate", "onnx", "onnxscript", "numpy")
ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu")  # packages with the same module: the last one installed is imported
# What decides whether half precision is fast on a CPU.
CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "asimd", "bf16")
LOOK_SECONDS = 0.1  # for which the CPU is watched while nothing of ours runs
BUSY_LOAD, BUSY_PERCENT = 0.5, 25.0  # per core, and of all cores: more is other work that disturbs
KERNELS = {
    "_scaled_dot_product_flash_attention_for_cpu": "SDPA, flash attention (CPU)",
    "_scaled_dot_product_flash_attention": "SDPA, flash attention",
    "_scaled_dot_product_cudnn_attention": "SDPA, cuDNN attention",
    "_scaled_dot_product_efficient_attention": "SDPA, memory-efficient attention",
    "_scaled_dot_product_fused_attention_overrideable": "SDPA, fused attention (overridden)",
    "_scaled_dot_product_attention_math": "SDPA, math",
    "_safe_softmax": "SDPA, math",
    "_flash_attention_forward": "flash attention",
    "_efficient_attention_forward": "memory-efficient attention",
    "_softmax": "plain matrix products and softmax",
}


def environment(device: str, load_before: Sequence[float] | None = None) -> dict[str, Any]:
    """A JSON-ready account of this machine; no host name, no paths.

    `load_before`: `load_average()` from before work of our own, such as building engines; by default that of now.
    """
    import psutil
    import torch

    flags = cpu_flags()
    return {
        "date_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "cpu": cpu_name(),
        "cpu_features": [name for name in CPU_FEATURES if name in flags],
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_usable": _usable_cores(),
        "threads_torch": torch.get_num_threads(),
        "threads_environment": {name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ},
        "memory_total_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": gpu(),
        "gpu_driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "os": _system(),
        "python": platform.python_version(),
        "versions": versions(),
        "onnxruntime_packages": _installed(ONNXRUNTIMES),
        **_state(device),
        **({} if load_before is None else {"load_average": list(load_before)}),
    }


def state_after(device: str) -> dict[str, Any]:
    """What of `environment` moves while it is measured, under names that end in `_after`."""
    return {f"{name}_after": value for name, value in _state(device).items()}


def _state(device: str) -> dict[str, Any]:
    """Clocks and load now."""
    import psutil

    frequency = psutil.cpu_freq()
    return {
        "cpu_mhz": round(frequency.current) if frequency else None,
        "cpu_busy_percent": psutil.cpu_percent(LOOK_SECONDS),
        "load_average": load_average(),
        "gpu_state": gpu_state(device),
    }


def gpu_state(device: str) -> dict[str, float] | None:
    """Clocks, power and temperature of a GPU by NVML, what it can tell of them; None on a CPU and without NVML."""
    if (found := nvml_device(device)) is None:
        return None
    nvml, handle = found
    readings: dict[str, Callable[[], float]] = {
        "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "power_limit_w": lambda: nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000,
        "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "busy_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
    }
    state = {}
    for name, read in readings.items():
        with contextlib.suppress(nvml.NVMLError):  # some GPUs do not tell some
            state[name] = read()
    return state


def busy(here: Mapping[str, Any]) -> str | None:
    """In words what other work a machine had when a measurement began, None where it was quiet."""
    load, cores = (here.get("load_average") or (0,))[0], here.get("cores_usable") or 1
    gpu_percent = (here.get("gpu_state") or {}).get("busy_percent", 0)
    found = []
    if load > BUSY_LOAD * cores:
        found.append(f"its load average was {load:g} on {cores} core{'' if cores == 1 else 's'}")
    if (percent := here.get("cpu_busy_percent") or 0) > BUSY_PERCENT:
        found.append(f"other work kept {percent:.0f}% of its CPU busy")
    if gpu_percent > BUSY_PERCENT:
        found.append(f"other work kept its GPU busy {gpu_percent:.0f}% of the time")
    return " and ".join(found) or None


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_average() -> list[float] | None:
    """Load average over 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def _driver() -> str | None:
    """Version of the NVIDIA driver, as its kernel module states it."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0].split()
    except (OSError, IndexError):
        return None
    return next((word for word in words if word[:1].isdigit() and "." in word), None)


def _system() -> str:
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        name = platform.system()
    return f"{name}, kernel {platform.release()}, {platform.machine()}"


def versions() -> dict[str, str]:
    """Versions of sdkd, the libraries and every installed target; of onnxruntime, that of the module which runs."""
    from sdkd import __version__

    names = (*LIBRARIES, *(target.module for target in TARGETS.values()), *ONNXRUNTIMES)
    found = _installed(names)
    if (runs := availability("onnxruntime").version) is not None:
        found["onnxruntime"] = runs
    return {"sdkd": __version__, **found}


def _installed(names: Sequence[str]) -> dict[str, str]:
    return {name: version for name in names if (version := installed_version(name))}


def attention_kernel(work: Callable[[], object]) -> str:
    """Which attention kernels PyTorch dispatches to while `work` runs, by watching, not by asking what is allowed."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(str(func).split(".")[1] if str(func).count(".") else str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        work()
    found = [text for name, text in KERNELS.items() if name in seen]
    fused = [text for text in found if text.startswith("SDPA")] or found
    return " and ".join(dict.fromkeys(fused)) or "unknown"


@dataclass(frozen=True)
class Memory:
    """What one case took, in bytes; None where it is not known.

    `peak_rss`: growth from the fresh process (`base_rss`, libraries imported) to its peak; only in a process of its
    own. `peak_gpu`: the process on the GPU, its context included (NVML). `peak_torch`: PyTorch's tensors on the GPU.
    """

    base_rss: int = 0
    growth: int = 0  # from before loading to after the first image
    peak_rss: int | None = None
    peak_gpu: int | None = None
    peak_torch: int | None = None

    def with_peaks_of(self, other: Memory) -> Memory:
        """The larger peaks of two processes of one case; the rest as it is here."""
        peaks = [_larger(getattr(self, name), getattr(other, name)) for name in ("peak_rss", "peak_gpu", "peak_torch")]
        return Memory(self.base_rss, self.growth, *peaks)


def _larger(first: int | None, second: int | None) -> int | None:
    return max((value for value in (first, second) if value is not None), default=None)


def rss() -> int:
    """Bytes of RAM that this process holds now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_rss() -> int:
    """The most bytes of RAM that this process ever held; a forked one begins with what its parent held then."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # not Linux
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak if sys.platform == "darwin" else peak * 1024)


def torch_peak(device: str) -> int | None:
    """The most bytes that PyTorch's tensors took on a GPU in this process; None on a CPU."""
    if not device.startswith("cuda"):
        return None
    import torch

    return int(torch.cuda.max_memory_allocated(device))


def gpu_used(device: str) -> int | None:
    """Bytes that this process holds on a GPU now, by NVML; None on a CPU and where NVML cannot tell.

    It cannot without nvidia-ml-py, and inside some containers, where it knows processes by other numbers.
    """
    if (found := nvml_device(device)) is None:
        return None
    nvml, handle = found
    try:
        used = {process.pid: process.usedGpuMemory for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)}
    except nvml.NVMLError:
        return None
    mine = used.get(os.getpid())
    return None if mine is None else int(mine)


def nvml_device(device: str) -> tuple[Any, Any] | None:
    """NVML's module and its handle of torch's device; None on a CPU and where there is no NVML.

    Found by the GPU's UUID: NVML numbers all GPUs of the machine, torch those of CUDA_VISIBLE_DEVICES.
    """
    if not device.startswith("cuda"):
        return None
    try:
        import pynvml
    except ImportError:
        return None
    import torch

    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
    except (pynvml.NVMLError, AttributeError):  # no driver, part of a GPU (MIG), or a torch that knows no UUID
        return None
