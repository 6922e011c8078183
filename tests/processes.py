"""`sdkd` in a process of its own, forked from a server that has the libraries loaded, and Ctrl-C in one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from sdkd.compare.measure.runner import PRELOAD
from sdkd.core.child import inherited


class Dropping:
    """Its `__del__` gets a Ctrl-C: Python prints the exception there and goes on."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(100))  # Python looks at signals here


def started(words: Sequence[object], log: Path, **variables: str) -> ForkServerProcess:
    """`sdkd` with these words, in a process group of its own as from a terminal; what it prints goes into `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | variables
    process = context.Process(target=_run, args=([str(word) for word in words], environment, log))
    with inherited():
        process.start()
    return process


def _run(words: list[str], environment: dict[str, str], log: Path) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.argv = ["sdkd", *words]
    from sdkd.cli import main

    main()


def finished(words: Sequence[object], log: Path, seconds: float = 120, **variables: str) -> int | None:
    """The exit status of `sdkd` with these words; nothing of it is left running."""
    process = started(words, log, **variables)
    try:
        process.join(seconds)
        return process.exitcode
    finally:
        kill(process)


def interrupted(
    words: Sequence[object], log: Path, ready: Callable[[], bool], seconds: float = 60, **variables: str
) -> int | None:
    """Interrupt `sdkd` and its children once it is `ready` (or after `seconds`), unless it is done; its exit status."""
    process = started(words, log, **variables)
    try:
        end = time.monotonic() + seconds
        while process.is_alive() and time.monotonic() < end and not ready():
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGINT)
        process.join(60)
        return process.exitcode
    finally:
        kill(process)


def kill(process: ForkServerProcess) -> None:
    """End a process and its children where it has not ended."""
    if process.is_alive():
        with contextlib.suppress(ProcessLookupError):  # it may end at this very moment
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()
        process.join()
