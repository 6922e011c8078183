"""`sdkd doctor`: what this machine can build and run, and what to install."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from typing import Annotated, Any

import typer

from sdkd import __version__
from sdkd.console import show, show_json, table
from sdkd.targets import TARGETS, Availability, availability, cpu_name, gpu, installed_version

LIBRARIES = (
    "torch", "diffusers", "transformers", "accelerate", "peft", "onnx", "onnxscript", "onnxruntime", "openvino",
    "tensorrt", "tensorrt_rtx", "polygraphy",
)  # fmt: skip


def examine() -> dict[str, Any]:
    """Everything doctor knows, JSON-ready: machine, libraries and one row per target."""
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
            "gpu": _gpu(),
        },
        "libraries": {name: installed_version(name) for name in LIBRARIES},
        "targets": [asdict(availability(name)) for name in TARGETS],
    }


def _gpu() -> dict[str, Any] | None:
    """Name, compute capability, memory and, where NVML is there, the driver."""
    device = gpu()
    if device is None:
        return None
    import torch

    result: dict[str, Any] = dict(device)
    result["memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    result["cuda"] = torch.version.cuda
    if installed_version("nvidia-ml-py"):
        import pynvml

        pynvml.nvmlInit()
        result["driver"] = pynvml.nvmlSystemGetDriverVersion()
    return result


def _yes(value: bool) -> str:
    return "[green]yes[/]" if value else "no"


def _row(row: Availability) -> list[str]:
    fix = row.fix.replace("[", r"\[")
    return [row.target, row.version or "-", _yes(row.can_build), _yes(row.can_run), row.reason, fix]


def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False) -> None:
    """Say what this machine can build and run, and what to install."""
    found = examine()
    if json:
        show_json(found)
        return
    machine = found["machine"]
    device = machine.pop("gpu")
    rows = [[key.replace("_", " "), value] for key, value in machine.items()]
    rows += [[key.replace("_", " "), value] for key, value in (device or {"gpu": "none seen by torch"}).items()]
    libraries = [[name, version or "not installed"] for name, version in found["libraries"].items()]
    columns = ["target", "version", "builds here", "runs here", "why", "to do"]
    targets = [_row(Availability(**row)) for row in found["targets"]]
    show(table("Machine", ["", ""], rows), table("Libraries", ["", "version"], libraries))
    show(table("Targets", columns, targets))
