"""From safetensors to engines: seconds, peak memory and size for each model and target that builds here.

    python tools/bench_build.py                                       # SD 1.5's shapes: teacher, small, tiny
    python tools/bench_build.py --models random:sd15-tiny --targets onnxruntime,openvino-bf16 --rounds 3
    python tools/bench_build.py --models random:vega,random:koala-700m,random:ssd-1b,random:sdxl \
        --targets onnxruntime,openvino,tensorrt-rtx --size 512..1024 --batch 1 --result build-sdxl

A model with random weights is saved once as a diffusers folder; every run is `sdkd build-engine` on that folder in a
process of its own, export and both checks included, beside Optimum's export to ONNX, which ends where its runtime
begins. One run of each way a round, in rotating order. What refuses, as for lack of memory, has its message for a
result. Writes benchmarks/<machine>/build.json (raw samples) and build.md. Run it on a quiet machine; it removes what it
wrote to disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench_kit.commands import Costs, Measured, memory_cells
from bench_kit.results import NONE

from sdkd.bundle.manifest import Bundle
from sdkd.core.console import markdown_table

_BUILD = ("sdkd", "build-engine", "FOLDER", "--size", "SIZE", "--batch", "BATCH", "--output", "OUT")
TARGETS: dict[str, tuple[str, ...]] = {
    "onnxruntime": (*_BUILD, "--target", "onnxruntime"),
    "openvino": (*_BUILD, "--target", "openvino"),
    "openvino-bf16": (*_BUILD, "--target", "openvino", "--precision", "bf16"),
    "tensorrt-rtx": (*_BUILD, "--target", "tensorrt-rtx", "--precision", "fp16"),
    "optimum": ("optimum-cli", "export", "onnx", "--model", "FOLDER", "--task", "text-to-image", "OUT"),
}


def describe(output: Path) -> dict[str, Any]:
    """Seconds and bytes of every component's export and engine; of Optimum's export the files alone, and of what was
    refused nothing.
    """
    if not (output / "bundle.json").is_file():
        files = [file for file in output.rglob("*") if ".onnx" in file.name]
        return {"engine_bytes": sum(file.stat().st_size for file in files), "components": {}}
    manifest = Bundle.open(output).manifest
    engines = {engine.component: engine for engine in manifest.engines.values()}
    return {
        "engine_bytes": sum(engine.total_bytes for engine in engines.values()),
        "components": {
            name: {"export_seconds": record.seconds, "build_seconds": engines[name].seconds,
                   "engine_bytes": engines[name].total_bytes}
            for name, record in manifest.components.items() if name in engines
        },
    }  # fmt: skip


def rows(found: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """Medians and raw samples of every target, and what it was refused with."""
    return [
        {"target": name, "command": " ".join(TARGETS[name]), "refused": measured.refused, **measured.figures(),
         **measured.written}
        for name, measured in found.items()
    ]  # fmt: skip


def page(found: Mapping[str, Any]) -> list[str]:
    """The tables for people."""
    lines = [
        "# From safetensors to engines",
        "",
        f"Measured on {found['machine']}, {found['date']}, commit {found['commit']}, rounds: {found['rounds']}; models "
        f"with random weights, size {found['size']} px, batch {found['batch']}. Export, parity with PyTorch, build and "
        "parity of the engine (on targets that run here) included.",
    ]
    heads = ("target", "s", "UNet: export, s", "UNet: build, s", "peak memory, GB", "of it anonymous, GB",
             "engines, MB")  # fmt: skip
    for part in found["models"]:
        lines += ["", f"## {part['model']}", "", *markdown_table(heads, [_cells(each) for each in part["rows"]])]
        refused = [each for each in part["rows"] if each["refused"]]
        lines += ["", *(f"- `{each['target']}` refused: {each['refused']}" for each in refused)] if refused else []
    optimum = ["`optimum` is Optimum's export in float32 with its own check: ONNX files, as its runtime opens them."]
    return [
        *lines,
        "",
        *(optimum if found["optimum"] else []),
        "Peak memory is that of all processes together and counts mapped pages of weight files; anonymous memory",
        "does not.",
    ]


def _cells(each: Mapping[str, Any]) -> list[str]:
    unet = each["components"].get("unet")
    parts = [f"{unet[key]:.1f}" if unet else NONE for key in ("export_seconds", "build_seconds")]
    size = NONE if each["refused"] else f"{each['engine_bytes'] / 1e6:,.0f}"
    return [each["target"], f"{each['seconds']:.1f}", *parts, *memory_cells(each), size]


MODELS = "random:sd15,random:sd15-small,random:sd15-tiny"
SHAPES = {"size": "512", "batch": "1..4"}
COSTS = Costs("build", "targets", TARGETS, MODELS, 1, describe, rows, page, SHAPES, refusals=True)

if __name__ == "__main__":
    COSTS.main(__doc__)
