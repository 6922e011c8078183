"""Ctrl-C and SIGTERM: never lost in a `__del__`, acted on between two steps, at once when they come again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
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


def test_a_signal_after_the_last_step_is_heard_when_the_steps_end() -> None:
    with pytest.raises(KeyboardInterrupt, match=r"^$"), between_steps():
        os.kill(os.getpid(), signal.SIGINT)


SCRIPT = """
import sys, time
from pathlib import Path
from sdkd.cli import guarded
from sdkd.core.files import new_folder
from sdkd.core.interrupts import between_steps, hear_signals

def work():
    with new_folder(Path(sys.argv[1])) as partial:
        (partial / "half").write_text("x")
        try:
            print("begun", flush=True)
            with between_steps() as check:
                while "steps" in sys.argv:
                    time.sleep(0.01)
                    check()
            time.sleep(60)
        finally:
            print("cleaning", flush=True)
            if "slow" in sys.argv:
                time.sleep(60)

hear_signals()
guarded(work)()
"""


def started(*words: str) -> subprocess.Popen[str]:
    """The script, in the middle of its work."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [
        (signal.SIGTERM, 143, "sdkd: ended by SIGTERM: nothing half-written was kept\n"),
        (signal.SIGINT, 130, "sdkd: interrupted: nothing half-written was kept\n"),
    ],
)
@pytest.mark.parametrize("words", [(), ("steps",)])
def test_a_signal_cleans_up(
    number: signal.Signals, status: int, message: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    with started(str(tmp_path / "out"), *words) as process:
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (status, message)
    assert list(tmp_path.iterdir()) == []


def test_a_second_signal_ends_at_once_and_the_next_run_sweeps(tmp_path: Path) -> None:
    with started(str(tmp_path / "out"), "slow") as process:
        process.send_signal(signal.SIGTERM)
        assert process.stdout
        assert process.stdout.readline() == "cleaning\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "\nsdkd: ended at once, by a second signal\n")
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".partial")
    with started(str(tmp_path / "out")) as process:
        process.terminate()
    assert list(tmp_path.iterdir()) == []
