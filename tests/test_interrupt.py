"""Ctrl-C in the middle of each long command: one message, status 130, nothing half-written."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import tiny_pipeline
from processes import interrupted
from small_bundles import small_pipeline

MARK = "SDKD_TEST_MARK"  # a variable by which processes of a command are known
# Each command with a sign (in what it prints) that it is in the middle of its work; `cache` is interrupted in
# tests/sdkd/distill/test_distill_cache_job.py, and finetune and lora are distill's run.
COMMANDS = {
    "student": (["student", "{teacher}", "{out}", "--student", "tiny"], "loading the teacher"),
    "distill": (
        [
            *("distill", "--teacher", "{teacher}", "--student", "tiny", "--data", "demo"),
            *("--output", "{out}", "--steps", "100000", "--device", "cpu"),
        ],
        "encoding",
    ),
    "export": (["export", "{model}", "{out}"], "unet"),
    "build-engine": (["build-engine", "{model}", "--target", "openvino", "--output", "{out}"], "unet"),
    "compare": (
        [
            *("compare", "{model}", "--targets", "eager", "--prompts", "a cat", "--steps", "1"),
            *("--runs", "100000", "--output", "{out}"),
        ],
        "timing",
    ),
}
BRIEF = {"student"}  # over within a second of its sign
SLOW = {"compare", "student"}  # a student's command in this process: tests/sdkd/commands/test_sdkd_student_cli.py


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pipelines on disk: a teacher that has students, and a smaller one."""
    home = tmp_path_factory.mktemp("models")
    tiny_pipeline().save_pretrained(home / "teacher")
    small_pipeline().save_pretrained(home / "model")
    return {name: home / name for name in ("teacher", "model")}


def _marked(mark: str) -> list[str]:
    """Command lines of the processes that a command of ours has left."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                found.append(" ".join(process.cmdline()))
    return found


def _begun(log: Path, sign: str) -> bool:
    """Whether a command has printed its sign."""
    return log.exists() and sign in log.read_text()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in COMMANDS]
)
def test_an_interrupted_command_leaves_nothing_half_written(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    words, sign = COMMANDS[name]
    work = tmp_path / "work"
    work.mkdir()
    arguments = [word.format(**models, out=work / "out") for word in words]
    log = tmp_path / "log"
    status = interrupted(arguments, log, lambda: _begun(log, sign), seconds=90, **{MARK: str(tmp_path)})
    printed = log.read_text()
    if status == 0 and name in BRIEF:
        pytest.skip("the command was done before it could be interrupted")
    assert status == 130, printed[-2000:]
    assert "interrupted: nothing half-written was kept" in printed
    assert "Traceback" not in printed
    left = {path.name for path in work.iterdir() if not path.name.endswith(".lock")}
    whole = (work / "out" / "bundle.json").exists()  # the export before a build is whole, and stays
    assert left <= ({"out"} if whole else set())
    assert not list(work.rglob("*.partial"))
    end = time.monotonic() + 30
    while (running := _marked(str(tmp_path))) and time.monotonic() < end:
        time.sleep(0.1)
    assert running == []


@pytest.mark.parametrize(
    "raised",
    [
        'exec("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)")',  # as inside a dataclass that is being made
        "try:\n        os.kill(os.getpid(), signal.SIGINT); time.sleep(9)\n"
        "    except BaseException as error:\n        raise OSError('model.safetensors is damaged') from error",
    ],
)
def test_an_interrupt_ends_with_status_130_wherever_it_came(raised: str, tmp_path: Path) -> None:
    source = f"""\
import os, signal, time
from sdkd.cli import guarded, hear_signals
hear_signals()
@guarded
def work():
    {raised}
work()
"""
    (tmp_path / "work.py").write_text(source)
    places = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(tmp_path)])}
    done = subprocess.run([sys.executable, "-m", "work"], env=places, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "sdkd: interrupted: nothing half-written was kept\n")
