"""Run engines inside a diffusers pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engines.pipelines.pipeline import load_pipeline, plug, unplug
    from engines.pipelines.weights import swap_weights
    from engines.sessions.opening import open_session

__all__ = ["load_pipeline", "open_session", "plug", "swap_weights", "unplug"]

_HOMES = {"open_session": "engines.sessions.opening", "swap_weights": "engines.pipelines.weights"}


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that `import engines` stays free of torch."""
    import importlib

    if name in __all__:
        return getattr(importlib.import_module(_HOMES.get(name, "engines.pipelines.pipeline")), name)
    raise AttributeError(f"module 'engines' has no attribute {name!r}")
