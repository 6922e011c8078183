"""Ctrl-C, and SIGTERM, which is treated like it: in long work heard at once, acted on between two steps.

Python raises KeyboardInterrupt wherever it happens to be. In a `__del__`, which torch has many of, it is printed and
dropped, and the work goes on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM)
_heard: list[int] = []  # the signals of this process, in order


def is_main() -> bool:
    """Whether this is the first of the processes that a launcher started."""
    return int(os.environ.get("RANK", "0")) == 0


def hear_signals() -> None:
    """Have SIGTERM (docker stop, Slurm) clean up as Ctrl-C does, and a second signal end the process at once.

    Not where a signal is ignored (nohup), nor in the other processes that a launcher started: they may wait for one
    another in a library that hears nothing, and the launcher would wait for them. In the first of them only one signal
    is heard: Ctrl-C reaches processes and launcher alike, and the launcher's SIGTERM comes while this one cleans up.
    """
    if not is_main():
        return
    usual = (signal.default_int_handler, signal.SIG_DFL)
    for number in ENDING:
        if signal.getsignal(number) in usual:
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: object) -> None:
    if _heard and "RANK" in os.environ:
        return
    if _heard:
        os.write(2, b"\nsdkd: ended at once, by a second signal\n")
        os._exit(128 + number)
    _heard.append(number)
    raise KeyboardInterrupt


def ended_by_term() -> bool:
    """Whether it was SIGTERM that interrupted this process, not Ctrl-C."""
    return _heard[:1] == [signal.SIGTERM]


def heard() -> bool:
    """Whether a signal to end was raised in this process: what fails after it fails because of it."""
    return bool(_heard)


def ended(said: str) -> tuple[str, int]:
    """What a command that was interrupted says, and its exit status: 130, or 143 after SIGTERM."""
    # Python notes a KeyboardInterrupt that left an `exec` of text (dataclasses are made so), and kills itself by SIGINT
    # when it ends, whoever caught it. The next such text takes that back.
    eval("0")  # noqa: S307
    number, what = (signal.SIGTERM, "ended by SIGTERM") if ended_by_term() else (signal.SIGINT, "interrupted")
    return said or f"{what}: nothing half-written was kept", 128 + number


@contextlib.contextmanager
def handling(handler: Any, *numbers: int) -> Iterator[None]:
    """Inside, these signals go to `handler`; outside the main thread nothing is changed."""
    here = numbers if threading.current_thread() is threading.main_thread() else ()
    usual = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    before: dict[int, Any] = {}
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, here)  # none comes between two changes
        before.update({number: signal.signal(number, handler) for number in here})
        signal.pthread_sigmask(signal.SIG_SETMASK, usual)
        yield
    finally:
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, here)
        finally:
            for number, handled in before.items():
                signal.signal(number, handled)
            signal.pthread_sigmask(signal.SIG_SETMASK, usual)


@contextlib.contextmanager
def between_steps() -> Iterator[Callable[[], None]]:
    """Inside, the first signal only sets a flag; the function given, called between steps, then does what is due.

    So does leaving. The second signal does it at once. Signals that are ignored, or end the process without Python's
    doing, stay so; outside the main thread nothing is changed.
    """
    heard: list[int] = []
    before: dict[int, Any] = {number: found for number in ENDING if callable(found := signal.getsignal(number))}

    def handle(number: int, frame: object) -> None:
        if heard:
            before[number](number, frame)
        heard.append(number)

    def check() -> None:
        if heard:
            before[heard[0]](heard[0], None)
        elif _heard:  # its exception was dropped before, in a `__del__`
            raise KeyboardInterrupt

    with handling(handle, *before):
        try:
            yield check
        except Exception:
            if "RANK" in os.environ:  # the other processes of a launcher have left already: that is why this one failed
                check()
            raise
    if heard:  # after the last step
        check()
