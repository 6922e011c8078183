"""The embedded default: procedural captioned images, a small trained teacher, and a reader that checks its pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdkd.demo.teacher import load_teacher, teacher_path

__all__ = ["load_teacher", "teacher_path"]


def __getattr__(name: str) -> Any:
    """Load `sdkd.demo.teacher` on first use, so that importing this package costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sdkd.demo import teacher

    return getattr(teacher, name)
