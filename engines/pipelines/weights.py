"""The weights of plugged pipelines: others in their engines, and saving them where the eager modules are kept.

diffusers leaves out modules that it does not know when it saves, with a warning, and writes a folder that nothing
loads. The guard is on its class, since pipelines that are made from a plugged one (`from_pipe`) share the engines and
no method.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from engines.modules.base import LORA_PARTS, EngineModule
from engines.pipelines.parts import PARTS
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
    if not isinstance(module, EngineModule):
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


@functools.cache
def guard_saving() -> None:
    """Make `save_pretrained` of all diffusers pipelines look for engines first; done once."""
    original = DiffusionPipeline.save_pretrained

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: str | Path, *arguments: Any, **options: Any) -> None:
        with contextlib.ExitStack() as stack:
            original(_as_eager(self, stack), save_directory, *arguments, **options)

    DiffusionPipeline.save_pretrained = save_pretrained


def _as_eager(pipe: Any, stack: contextlib.ExitStack) -> Any:
    """The pipeline with its eager modules until the stack is closed; EngineError where one is not kept."""
    engines = {name: module for name in PARTS if isinstance(module := getattr(pipe, name, None), EngineModule)}
    if not engines:
        return pipe
    whole = copy.copy(pipe)
    for name, module in engines.items():
        setattr(whole, name, stack.enter_context(module.as_eager()))
    return whole
