"""SIGTERM (docker stop, Slurm) is treated as Ctrl-C; a second signal ends a command at once."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

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
