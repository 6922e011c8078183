"""Ctrl-C: for a command that runs in a process group of its own, as from a terminal, and in a `__del__`."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


class Dropping:
    """Its `__del__` gets a Ctrl-C: Python prints the exception there and goes on."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(100))  # Python looks at signals here


def interrupted(
    words: Sequence[str], log: Path, environment: Mapping[str, str], ready: Callable[[], bool], seconds: float = 60
) -> int:
    """Start a command, interrupt it and its children once it is `ready` (or after `seconds`); its exit status.

    What it prints goes into `log`. Nothing of it is left running.
    """
    with log.open("w") as stream:
        process = subprocess.Popen(words, stdout=stream, stderr=stream, env=environment, start_new_session=True)
        try:
            end = time.monotonic() + seconds
            while process.poll() is None and time.monotonic() < end and not ready():
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGINT)
            return process.wait(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
