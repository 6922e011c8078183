"""`sdkd generate` in several processes: started by torchrun, joined by Accelerate, each with batches of its own."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from sdkd.core.console import Progress, progress, quiet
from sdkd.core.interrupts import ENDING, handling
from sdkd.errors import InputError
from sdkd.targets.registry import check_target, runs_on_gpu

_PATIENCE = timedelta(days=30)  # a process waits for the slowest, which may have hours to go; torchrun ends orphans


def on_gpu(target: str) -> bool:
    """Whether a target, or `eager`, draws on a GPU."""
    return target != "eager" and runs_on_gpu(check_target(target))


def check_gpus(target: str, processes: int) -> None:
    """InputError when a GPU target has fewer GPUs on this machine than processes."""
    if processes <= 1 or not on_gpu(target):
        return
    import torch

    if (found := torch.cuda.device_count()) < processes:
        raise InputError(
            f"{processes} processes need {processes} GPUs for target {target}, and this machine has {found}: "
            f"give --num-processes {max(1, found)}"
        )


def join(target: str) -> Any:
    """Accelerate's PartialState among the processes that a launcher started, or alone; InputError as `check_gpus`.

    Processes of a GPU target get a GPU each and talk through NCCL, others through gloo.
    """
    from accelerate import PartialState

    check_gpus(target, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return PartialState(cpu=not on_gpu(target), timeout=_PATIENCE)


@contextlib.contextmanager
def main_progress(title: str, state: Any) -> Iterator[Progress]:
    """The progress of the main process; the others' is not shown."""
    with progress(title) if state.is_main_process else contextlib.nullcontext(quiet) as report:
        yield report


@contextlib.contextmanager
def ended_like_ctrl_c(state: Any) -> Iterator[None]:
    """Let SIGTERM, by which a launcher ends the other processes when one fails, clean up as Ctrl-C does.

    Only the first of all signals is heard: Ctrl-C reaches processes and launcher alike, and the launcher's SIGTERM then
    comes while they clean up. Not for waiting: a process that waits for others hears nothing, and the launcher would
    wait for it.
    """
    with handling(_interrupt_once, *ENDING) if state.num_processes > 1 else contextlib.nullcontext():
        yield


def _interrupt_once(number: int, frame: object) -> None:
    for ending in ENDING:
        signal.signal(ending, signal.SIG_IGN)
    raise KeyboardInterrupt
