"""From a diffusers pipeline to checked ONNX and to engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.build.engines import build_engine
    from export.pipeline import export_pipeline

__all__ = ["build_engine", "export_pipeline"]

_HOMES = {"export_pipeline": "export.pipeline", "build_engine": "export.build.engines"}


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that `import export` stays free of torch."""
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'export' has no attribute {name!r}")
