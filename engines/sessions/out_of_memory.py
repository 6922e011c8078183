"""Memory that ran out while an engine was opened or run: one error, whatever the library called it, and nothing kept.

What a failed call had allocated is let go before the error goes up, however long somebody keeps that error, and what
torch's allocator had set aside goes back to the device, where the engines' libraries can have it.
"""

from __future__ import annotations

import contextlib
import re
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from sdkd.bundle.memory import free_gpu_memory, free_memory, size
from sdkd.errors import OutOfMemoryError

Made = TypeVar("Made")
CAPTURING = threading.Lock()
"""Held while a CUDA graph is captured: synchronizing the device would break the capture, whatever thread does it."""

# How CUDA, torch, TensorRT, ONNX Runtime, OpenVINO and C++ call it.
WORDS = re.compile(
    r"out of memory|OutOfMemory|insufficient gpu memory|fail(ed|ure) to allocate|(cannot|can't) allocate|bad.alloc"
    r"|could not be allocated|ALLOC_FAILED|cudaErrorMemoryAllocation",
    re.IGNORECASE,
)
OOM_ON_LOAD_HINT = "Close other programs, or open the engines in turn: low_memory=True"
OOM_ON_RUN_HINT = "Ask for fewer images at once or a smaller size, or close other programs"
SAID = 300  # characters of the library's words


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of the host or of a GPU."""
    named = isinstance(error, torch.cuda.OutOfMemoryError | MemoryError | OutOfMemoryError)
    return named or (isinstance(error, RuntimeError) and bool(WORDS.search(str(error))))


def give_back(error: BaseException) -> None:
    """Let go of what an error's finished calls hold, and give what torch keeps in store back to its device."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    if torch.cuda.is_available():
        with CAPTURING:  # freeing waits for the device, which would break a capture
            torch.cuda.empty_cache()


@contextlib.contextmanager
def raises_out_of_memory(what: str, advice: str, *, on_gpu: bool) -> Iterator[None]:
    """`raise_out_of_memory` for any error; others pass."""
    try:
        yield
    except Exception as error:
        raise_out_of_memory(error, what, advice, on_gpu=on_gpu)
        raise


def raise_out_of_memory(error: Exception, what: str, advice: str, *, on_gpu: bool) -> None:
    """OutOfMemoryError from an error that says so: what ran out, the library's words, what is free, the advice.

    Large tensors belong into calls that are over: those of the frame that handles the error stay.
    """
    if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
        return
    said = " ".join(str(error).split())[:SAID] or type(error).__name__
    give_back(error)
    kind, free = ("GPU memory", free_gpu_memory()) if on_gpu else ("memory", free_memory())
    raise OutOfMemoryError(f"{what} ran out of {kind} ({said}): {size(free)} are free now. {advice}") from error


def once_more(make: Callable[[], Made]) -> Made:
    """What `make` gives; where memory runs out, what can be given back is, and it is tried once more."""
    try:
        return make()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        give_back(error)
    return make()
