"""The embedded default: procedural captioned images and a small trained teacher.

The teacher is an 11-million-parameter Stable Diffusion pipeline for 64x64 images of the demo's captions.
Trained by tools/train_demo_teacher.py; how well it does is measured in benchmarks/demo-teacher/accuracy.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sdkd.errors import ModelError

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline


def teacher_path() -> Path:
    """The diffusers folder of the teacher (half precision); ModelError when the package came without it."""
    path = Path(__file__).parent / "weights"
    if not (path / "model_index.json").is_file():
        raise ModelError(
            "the demo teacher is not part of this installation: install sdkd again, or in a checkout run "
            "python tools/train_demo_teacher.py --work artifacts/demo-teacher --output sdkd/demo/weights"
        )
    return path


def load_teacher(torch_dtype: torch.dtype | None = None) -> StableDiffusionPipeline:
    """The teacher as an eager pipeline on the CPU, in float32 unless another dtype is asked for."""
    from sdkd.models.resolve import load_eager

    return load_eager("demo", torch_dtype)
