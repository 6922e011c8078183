"""Training UNets: knowledge distillation from a teacher, fine-tuning, and LoRA, with one trainer.

    from sdkd.distill import TrainConfig, train

Names are imported on first use, so that `import sdkd.distill` loads neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdkd.distill.training.config import TrainConfig
    from sdkd.distill.training.loop import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "train"]

_HOMES = {"TrainConfig": "training.config", "TrainResult": "training.loop", "train": "training.loop"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
