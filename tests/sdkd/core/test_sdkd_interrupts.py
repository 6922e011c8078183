"""Ctrl-C in long work: never lost in a `__del__`, acted on between two steps, at once when it comes again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from processes import Dropping

from sdkd.core import interrupts
from sdkd.core.interrupts import between_steps


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Signals as Python starts with them, and put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_in_a_del_is_not_lost() -> None:
    done = []

    def work() -> None:
        with between_steps() as check:
            for step in range(3):
                check()
                thing = Dropping() if step == 1 else None
                del thing
                done.append(step)

    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        work()
    assert done == [0, 1]  # the step that it came in was done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_was_lost_before_is_acted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "_heard", [])
    interrupts.hear_signals()
    thing = Dropping()
    del thing
    with between_steps() as check, pytest.raises(KeyboardInterrupt, match=r"^$"):
        check()


def test_the_second_signal_acts_at_once() -> None:
    done = []

    def work() -> None:
        with between_steps():
            for number in (1, 2):
                os.kill(os.getpid(), signal.SIGINT)
                done.append(number)

    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        work()
    assert done == [1]


def test_ignored_signals_stay_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with between_steps() as check:
        os.kill(os.getpid(), signal.SIGINT)
        check()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_handler_of_the_command_hears_its_own_signal() -> None:
    heard: list[int] = []

    def handle(number: int, frame: Any) -> None:
        heard.append(number)
        raise KeyboardInterrupt("ended")

    def work() -> None:
        with between_steps() as check:
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == []
            check()

    signal.signal(signal.SIGTERM, handle)
    with pytest.raises(KeyboardInterrupt, match="ended"):
        work()
    assert heard == [signal.SIGTERM]
