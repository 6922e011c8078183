"""Comparison of models and targets: speed, size and likeness, as JSON, Markdown and one HTML page.

Everything is loaded on first use: `import sdkd.compare` imports neither torch nor diffusers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdkd.compare.measure.comparison import compare
    from sdkd.compare.measure.results import Report
    from sdkd.compare.measure.subjects import Subject
    from sdkd.compare.report.files import write_report

__all__ = ["Report", "Subject", "compare", "write_report"]

_HOMES = {
    "Report": "measure.results",
    "Subject": "measure.subjects",
    "compare": "measure.comparison",
    "write_report": "report.files",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
