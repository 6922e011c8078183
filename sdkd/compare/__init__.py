"""Comparison of models and targets: speed, size and likeness, as JSON, Markdown and one HTML page.

Everything is loaded on first use: `import sdkd.compare` imports neither torch nor diffusers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdkd.compare.comparison import compare
    from sdkd.compare.folder import write_report
    from sdkd.compare.report import Report
    from sdkd.compare.subjects import Subject

__all__ = ["Report", "Subject", "compare", "write_report"]

_HOMES = {"Report": "report", "Subject": "subjects", "compare": "comparison", "write_report": "folder"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
