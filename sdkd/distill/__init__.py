"""Knowledge distillation of a student UNet from its teacher.

    from sdkd.distill import DistillConfig, distill

Names are imported on first use, so that `import sdkd.distill` loads neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdkd.distill.config import DistillConfig
    from sdkd.distill.trainer import DistillResult, distill

__all__ = ["DistillConfig", "DistillResult", "distill"]

_HOMES = {"DistillConfig": "config", "DistillResult": "trainer", "distill": "trainer"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
