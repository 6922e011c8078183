"""Block-removed students of a Stable Diffusion 1.x/2.x UNet, and LoRAs that fit them.

    from sdkd.students import build_student, remap_lora

Names are imported on first use, so that `import sdkd.students` loads neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdkd.students.blocks import (
        STUDENTS,
        StudentSpec,
        build_student,
        count_macs,
        count_parameters,
        key_map,
        remap_lora,
        student_config,
    )

__all__ = [
    "STUDENTS",
    "StudentSpec",
    "build_student",
    "count_macs",
    "count_parameters",
    "key_map",
    "remap_lora",
    "student_config",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("sdkd.students.blocks"), name)
