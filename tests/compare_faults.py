"""Delays and faults in a subject's timed UNet calls: in this process by its label, in its own process by its class."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

import sdkd.compare.measure.runner as runner
from sdkd.compare.measure.calls import UNET, WORKS, Request, step_work
from sdkd.compare.measure.subjects import Subject, open_subject
from sdkd.compare.measure.timing import Work

Fault = Callable[[], object]
HOG_BYTES = 300_000_000


def nap() -> None:
    """Take 50 ms longer."""
    time.sleep(0.05)


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


def plant(patch: pytest.MonkeyPatch, faults: Mapping[str, Fault]) -> None:
    """Begin every timed UNet call of the subjects of these labels with a fault."""
    labels: dict[int, str] = {}

    def opened(subject: Subject, *settings: Any) -> Any:
        pipe = open_subject(subject, *settings)
        labels[id(pipe)] = subject.label
        return pipe

    patch.setattr(runner, "open_subject", opened)
    patch.setitem(WORKS, UNET, lambda pipe, request: _after(faults.get(labels[id(pipe)]), pipe, request))


def _after(fault: Fault | None, pipe: Any, request: Request) -> Work:
    call = step_work(pipe, request)
    return call if fault is None else lambda: (fault(), call())


@dataclass(frozen=True)
class Faulty(Subject):
    """A subject whose timed UNet calls begin with a fault, in the process of its own that it is sent to."""

    fault: Fault = nap

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        WORKS[UNET] = lambda pipe, request: _after(self.fault, pipe, request)
