"""Opening an engine: the session class of its target, the device it works on, and memory that is short meanwhile."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engines.sessions.base import EngineSession
from engines.sessions.checks import check_engine, of_newest
from engines.sessions.out_of_memory import OOM_ON_LOAD_HINT, once_more, raises_out_of_memory
from sdkd.bundle.manifest import Bundle
from sdkd.targets.registry import check_target, runs_on_gpu

OPENERS = {
    "onnxruntime": ("engines.sessions.onnxruntime_session", "OnnxRuntimeSession"),
    "openvino": ("engines.sessions.openvino_session", "OpenVinoSession"),
    "tensorrt": ("engines.sessions.trt.session", "TensorRTSession"),
    "tensorrt-rtx": ("engines.sessions.trt.session", "TensorRTSession"),
    "inductor": ("engines.sessions.inductor_session", "InductorSession"),
}


def expected_device(target: str) -> torch.device:
    """Where a target's sessions keep their tensors here; the CPU, too, where the GPU that they need is missing."""
    if target == "onnxruntime":
        from engines.sessions.onnxruntime_session import chosen_provider
        from sdkd.targets.ort_providers import CPU

        on_gpu = chosen_provider() != CPU
    else:
        on_gpu = runs_on_gpu(check_target(target))
    if on_gpu and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def on_gpu(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a GPU torch's current one, where sessions open; nothing for another device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def open_session(bundle: Bundle | str | Path, slot: str, component: str, **options: Any) -> EngineSession:
    """Check and open one engine of a bundle; `options` are the target's own (e.g. `threads`).

    Raises what `check_engine` raises, and EngineError when the target's library refuses the engine after all:
    OutOfMemoryError for want of memory, after what torch keeps in store was given back.
    """
    return of_newest(as_bundle(bundle), slot, component, lambda current: _open(current, slot, component, **options))


def as_bundle(bundle: Bundle | str | Path) -> Bundle:
    """A bundle, opened where it is given as a folder."""
    return bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)


def _open(opened: Bundle, slot: str, component: str, **options: Any) -> EngineSession:
    checked = check_engine(opened, slot, component)
    module, name = OPENERS[checked.record.target]
    kind: Callable[..., EngineSession] = getattr(importlib.import_module(module), name)
    with raises_out_of_memory(
        f"opening {checked.label}", OOM_ON_LOAD_HINT, on_gpu=expected_device(checked.record.target).type == "cuda"
    ):
        return once_more(lambda: kind(checked, **options))
