"""Saving plugged pipelines: as eager ones where the eager modules are kept, and otherwise not at all.

diffusers leaves out modules that it does not know, with a warning, and writes a folder that nothing loads. The guard is
on its class, since pipelines that are made from a plugged one (`from_pipe`) share the engines and no method.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from engines.modules.base import EngineModule
from engines.pipelines.parts import PARTS


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
    for module in engines.values():  # all of them, before anything is written
        module.check_kept()
    if not engines:
        return pipe
    whole = copy.copy(pipe)
    for name, module in engines.items():
        setattr(whole, name, stack.enter_context(module.as_eager()))
    return whole
