"""Run engines inside a diffusers pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engines.opening import open_session
    from engines.pipeline import load_pipeline, plug, unplug
    from engines.swap import swap_weights

__all__ = ["load_pipeline", "open_session", "plug", "swap_weights", "unplug"]

_HOMES = {"open_session": "engines.opening", "swap_weights": "engines.swap"}


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that `import engines` stays free of torch."""
    import importlib

    if name in __all__:
        return getattr(importlib.import_module(_HOMES.get(name, "engines.pipeline")), name)
    raise AttributeError(f"module 'engines' has no attribute {name!r}")
