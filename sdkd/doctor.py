"""`sdkd doctor`: what this machine can build and run, and what to install."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from typing import Annotated, Any

import typer

from sdkd import __version__
from sdkd.console import show, show_json, table
from sdkd.targets import (
    TARGETS,
    Availability,
    availability,
    cpu_name,
    cuda_packages,
    driver_cuda,
    driver_version,
    gpu,
    installed_version,
)

LIBRARIES = (
    "torch", "diffusers", "transformers", "accelerate", "peft", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu",
    "openvino", "tensorrt", "tensorrt_rtx", "polygraphy", "nvidia-ml-py",
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
        "libraries": {name: installed_version(name) for name in LIBRARIES},
        "onnxruntime_providers": _providers(),
        "targets": [asdict(availability(name)) for name in TARGETS],
    }


def _gpu() -> dict[str, Any]:
    """The device as torch sees it, the driver and its CUDA; None for what is not there."""
    import torch

    device = gpu()
    runs = driver_cuda()
    memory = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if device else None
    packages = {
        name: major for target in TARGETS.values() for name, major in cuda_packages(target.distribution).items()
    }
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
        import onnxruntime
    except ImportError:
        return []
    return [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]


def _yes(value: bool) -> str:
    return "[green]yes[/]" if value else "no"


def _facts(found: dict[str, Any], details: bool) -> list[list[Any]]:
    rows = [[key.replace("_", " "), value] for key, value in found["machine"].items()]
    for key, value in found["gpu"].items():
        text = ", ".join(f"{name}: {major}" for name, major in value.items()) if isinstance(value, dict) else value
        if details or key in ("gpu", "driver") or value:
            rows.append([key.replace("_", " ").replace("cuda", "CUDA"), text or "none"])
    return [*rows, ["onnxruntime for", ", ".join(found["onnxruntime_providers"]) or "nothing"]]


def doctor(
    details: Annotated[bool, typer.Option("--details", help="Show every library, too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what this machine can build and run, and what to install."""
    found = examine()
    if json:
        show_json(found)
        return
    show(table("Machine", ["", ""], _facts(found, details)))
    if details:
        libraries = [[name, version or "not installed"] for name, version in found["libraries"].items()]
        show(table("Libraries", ["", "version"], libraries))
    targets = [Availability(**row) for row in found["targets"]]
    rows = [
        [one.target, (one.version or "-").partition("-")[0] or "-", _yes(one.can_build), _yes(one.can_run), one.reason]
        for one in targets
    ]
    show(table("Targets", ["target", "version", "builds here", "runs here", "why"], rows))
    for one in targets:
        if one.fix:
            show(f"  {one.target}: {one.fix}".replace("[", r"\["))
