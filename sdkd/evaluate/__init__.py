"""How good a model is: agreement with its teacher, caption accuracy, CLIP score, FID and CMMD.

    from sdkd.evaluate import Settings, evaluate, write_report

Names are imported on first use, so that `import sdkd.evaluate` loads neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdkd.evaluate.evaluation import Settings, evaluate
    from sdkd.evaluate.report import Evaluation, Metric, write_report

__all__ = ["Evaluation", "Metric", "Settings", "evaluate", "write_report"]

_HOMES = {
    "Evaluation": "report",
    "Metric": "report",
    "Settings": "evaluation",
    "evaluate": "evaluation",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
