"""Ctrl-C in long work: heard at once, acted on between two steps.

Python raises KeyboardInterrupt wherever it happens to be. In a `__del__`, which torch has many of, it is printed and
dropped, and the work goes on.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

_ENDING = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def between_steps() -> Iterator[Callable[[], None]]:
    """Inside, the first signal only sets a flag; the function given, called between steps, then does what is due.

    The second signal does it at once. Signals that are ignored, or end the process without Python's doing, stay so;
    outside the main thread nothing is changed.
    """
    heard: list[int] = []
    before: dict[int, Any] = {}

    def handle(number: int, frame: Any) -> None:
        if heard:
            before[number](number, frame)
        heard.append(number)

    def check() -> None:
        if heard:
            before[heard[0]](heard[0], None)

    if threading.current_thread() is threading.main_thread():
        before = {number: found for number in _ENDING if callable(found := signal.getsignal(number))}
    for number in before:
        signal.signal(number, handle)
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
