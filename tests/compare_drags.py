"""Delays and faults that tests plant in a subject's timed UNet calls, found by name in the subject's own process."""

from __future__ import annotations

import os
import signal

HOG_BYTES = 300_000_000


def hog() -> None:
    """Hold 300 MB for a moment."""
    assert bytearray(HOG_BYTES)


def die() -> None:
    """End the process as a system does that is out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    """End the process as a library does that gives up."""
    os._exit(3)


def fail() -> None:
    """Raise what no one expects."""
    raise ValueError("planted")
