"""Other weights of the same architecture in the engines of a plugged pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engines.modules.base import LORA_PARTS
from engines.sessions.weights import check_state
from sdkd.errors import EngineError, InputError


def swap_weights(pipe: Any, model: str | Path | Mapping[str, torch.Tensor] | None, part: str = "unet") -> None:
    """Run a plugged pipeline's `unet` or `text_encoder` with another checkpoint of the same architecture.

    `model`: any model that sdkd can name (a fine-tuned student's folder), a state dict, or None for the bundle's own
    weights. Adapters stay on top. Engines take the weights at their next run; whether they can is a matter of the
    target. Raises InputError for another part, EngineError where the part runs eagerly, ModelError for weights that do
    not fit.
    """
    if part not in LORA_PARTS:
        raise InputError(f"part {part!r} has no weights to swap: choose one of {', '.join(LORA_PARTS)}")
    module: Any = getattr(pipe, part, None)
    if not hasattr(module, "weights"):
        raise EngineError(f"the {part} of this {type(pipe).__name__} runs eagerly: plug an engine first")
    state = _state(model, part)
    if state:
        check_state(module.weights.session, state)
    module.weights.use(state)


def _state(model: str | Path | Mapping[str, torch.Tensor] | None, part: str) -> dict[str, torch.Tensor]:
    if model is None:
        return {}
    if isinstance(model, Mapping):
        return dict(model)
    from sdkd.models.resolve import load_component

    return dict(load_component(model, part).state_dict())  # type: ignore[arg-type]
