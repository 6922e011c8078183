"""The NVIDIA GPU that is here, its driver, and which CUDA the installed packages were made for."""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path

DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}  # the oldest for Linux, by major version of CUDA
DRIVER_FILES = ("/sys/module/nvidia/version", "/proc/driver/nvidia/version")


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
