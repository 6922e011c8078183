"""Memory of this process at its peak: in RAM as the system counts it, on a GPU as NVML and PyTorch count it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Memory:
    """What one case took, in bytes; None where it cannot be told.

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
    except (OSError, StopIteration):
        return _peak_elsewhere()


def _peak_elsewhere() -> int:
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
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
