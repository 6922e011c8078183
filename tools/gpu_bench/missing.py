"""What only a GPU can say, and which of it the results under benchmarks/ say already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]
# What a GPU would say: words, and what shows that it was measured there: a comparison's target, or the kind of a piece
# of tools/gpu_report.py, which measures it.
GPU_ROWS = (
    ("teacher and students in eager PyTorch: UNet steps", "eager"),
    ("the same as TensorRT engines", "tensorrt"),
    ("the same as TensorRT-RTX engines", "tensorrt-rtx"),
    ("the same on ONNX Runtime's CUDA", "onnxruntime"),
    ("the same with torch.compile", "compile"),
    ("whole images of 25 steps", "images"),
    ("decoding by the VAE", "vae"),
    ("a LoRA by refit and by rebuilding", "lora"),
    ("a distillation step, the reference's and ours", "train"),
    ("what the GPU can do at most", "ceilings"),
)
GPU_COMMAND = "python tools/gpu_report.py"  # docs/gpu.md


def environment_of(found: Json) -> Json:
    """Where it was measured, empty when the file does not say."""
    environment: Json = found.get("environment") or found.get("comparison", {}).get("environment") or {}
    return environment


def on_gpu(results: Sequence[Json]) -> set[str]:
    """What the results measured on a GPU."""
    there = [found for found in results if environment_of(found).get("gpu")]
    compared = [row for found in there if "comparison" in found for row in found["comparison"]["results"]]
    trained = {"train" for found in there if "students" in found}
    reported = {
        name.partition("/")[0]
        for found in there
        for name, piece in found.get("pieces", {}).items()
        if piece["rows"] and not found["dry_run"]
    }
    return trained | reported | {row["target"].removesuffix(f"-{row['precision']}") for row in compared}
