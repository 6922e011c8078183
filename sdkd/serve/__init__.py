"""`sdkd serve`: images over HTTP, drawn on engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdkd.serve.app import create_app

__all__ = ["create_app"]


def __getattr__(name: str) -> Any:
    """Load the application on first use: FastAPI is an extra."""
    if name == "create_app":
        from sdkd.serve.app import create_app

        return create_app
    raise AttributeError(f"module 'sdkd.serve' has no attribute {name!r}")
