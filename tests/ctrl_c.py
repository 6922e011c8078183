"""A command that runs in a process group of its own and gets Ctrl-C as from a terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


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
