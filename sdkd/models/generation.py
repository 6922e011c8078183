"""How a model is to be run: the steps, guidance scale and scheduler that it was trained for, as its folder notes them.

A few-step model draws badly with 25 steps and a guidance scale of 7.5; who trained it knows, and writes it down here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sdkd.core.schema import construct

GENERATION = "generation"  # key in a folder's sdkd.json and in the source of a bundle's manifest


@dataclass(frozen=True)
class Generation:
    """Denoising steps, guidance scale as diffusers counts it (1: none), and diffusers' class of the scheduler."""

    steps: int
    guidance_scale: float
    scheduler: str

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_json` reads it back."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Generation:
        """The inverse of `to_json`; TypeError on foreign data."""
        found: Generation = construct(data, Generation)
        return found


FEW_STEPS = Generation(4, 1.0, "LCMScheduler")  # of a consistency-distilled UNet without guidance embedding
EMBEDDED_FEW_STEPS = Generation(4, 8.5, "LCMScheduler")  # with it, as diffusers' LatentConsistencyModelPipeline draws
