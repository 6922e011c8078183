"""The child process: results, progress, errors that keep their class, crashes, Ctrl-C, a parent that dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from sdkd.core.child import BackgroundJob, ChildError, Failure, run_in_child
from sdkd.errors import InputError, MissingExtraError, RangeError

ROOT = Path(__file__).parents[3]
MODULE = """
import errno, os, signal, sys, time
from sdkd.errors import InputError, MissingExtraError, RangeError

def add(a, b, progress):
    print("noise on standard output")
    os.write(1, b"and from a library\\n")
    progress("adding", 0.5)
    return {"sum": a + b, "python": sys.executable, "cwd_on_path": "" in sys.path}

def refuse(progress):
    raise InputError("height 500 is not good: use 512")

def fail(progress):
    for index in range(1000):
        print("line", index, "x" * 3000, file=sys.stderr)
    print("[E] the library's last word", file=sys.stderr)
    raise RuntimeError("it broke")

def full(progress):
    raise OSError(errno.ENOSPC, "No space left on device", "engine")

def end(name, progress):
    os.kill(os.getpid(), getattr(signal, name))
    time.sleep(60)

def leave(progress):
    os._exit(3)

def sleep(progress):
    progress(str(os.getpid()), None)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module `jobs` that children can import."""
    (tmp_path / "jobs.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def _gone(pid: int, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_result_and_progress_come_back_clean_of_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # not the checkout: the child finds `export` by itself
    seen: list[tuple[str, float | None]] = []
    result = run_in_child("jobs:add", {"a": 2, "b": 3}, lambda message, fraction: seen.append((message, fraction)))
    assert result == {"sum": 5, "python": sys.executable, "cwd_on_path": False}
    assert seen == [("adding", 0.5)]


def test_our_errors_keep_their_class_and_message() -> None:
    with pytest.raises(InputError, match=r"^height 500 is not good: use 512") as caught:
        run_in_child("jobs:refuse", {})
    assert str(caught.value) == "height 500 is not good: use 512"
    assert "in refuse" in caught.value.__notes__[0]  # where, for --debug


def test_a_full_disk_stays_a_full_disk() -> None:
    with pytest.raises(OSError, match="No space left on device") as caught:
        run_in_child("jobs:full", {})
    assert caught.value.errno == 28
    assert caught.value.filename == "engine"


def test_other_errors_carry_a_bounded_tail_of_what_was_printed() -> None:
    with pytest.raises(ChildError, match=r"^RuntimeError: it broke") as caught:
        run_in_child("jobs:fail", {})
    assert caught.value.tail[-1] == "[E] the library's last word"
    assert len(caught.value.tail) == 200
    assert max(map(len, caught.value.tail)) <= 2000
    assert "in fail" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    "error",
    [
        RangeError("too large"),
        MissingExtraError("openvino", "openvino", "target 'openvino'"),
        FileNotFoundError(2, "No such file or directory", "x.json"),
    ],
)
def test_errors_cross_the_border_of_processes(error: Exception) -> None:
    found = Failure(**json.loads(json.dumps(asdict(Failure.of(error))))).error(ChildError)
    assert type(found) is type(error)
    assert str(found) == str(error)
    if isinstance(error, MissingExtraError):
        assert vars(found)["extra"] == "openvino"


def test_an_error_of_no_class_of_ours_is_its_base() -> None:
    class OddError(RangeError):
        pass

    assert type(Failure.of(OddError("odd")).error(ChildError)) is RangeError


def test_an_unknown_function_is_an_error() -> None:
    with pytest.raises(ChildError, match="ModuleNotFoundError: No module named 'nowhere'"):
        run_in_child("nowhere:build", {})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("SIGKILL", "ended by SIGKILL: the system most likely ran out of memory"),
        ("SIGSEGV", "ended by SIGSEGV: the library crashed"),
        ("SIGABRT", "ended by SIGABRT: the library crashed"),
    ],
)
def test_a_crash_is_one_clear_error(name: str, message: str) -> None:
    with pytest.raises(ChildError, match=message) as caught:
        run_in_child("jobs:end", {"name": name})
    assert caught.value.ended_by == name


def test_an_exit_without_a_result_is_an_error() -> None:
    with pytest.raises(ChildError, match="ended with status 3 and no result"):
        run_in_child("jobs:leave", {})


def test_ctrl_c_in_the_parent_ends_the_child() -> None:
    child: list[int] = []

    def interrupt(message: str, fraction: float | None) -> None:
        child.append(int(message))
        main = threading.main_thread().ident
        assert main
        threading.Timer(0.2, signal.pthread_kill, [main, signal.SIGINT]).start()

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        run_in_child("jobs:sleep", {}, interrupt)
    assert time.monotonic() - start < 30
    assert _gone(child[0])


def test_a_progress_that_fails_ends_the_child() -> None:
    child: list[int] = []

    def fail(message: str, fraction: float | None) -> None:
        child.append(int(message))
        raise ValueError("no terminal")

    with pytest.raises(ValueError, match="no terminal"):
        run_in_child("jobs:sleep", {}, fail)
    assert _gone(child[0])


def test_the_child_goes_when_the_parent_is_killed() -> None:
    code = "from sdkd.core.child import run_in_child; run_in_child('jobs:sleep', {}, lambda m, f: print(m, flush=True))"
    environment = os.environ | {"PYTHONPATH": f"{os.environ['PYTHONPATH']}{os.pathsep}{ROOT}"}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout
    pid = int(parent.stdout.readline())
    assert psutil.pid_exists(pid)
    parent.kill()
    parent.wait()
    assert _gone(pid)


def test_a_background_job_works_while_we_do_and_gives_its_progress_when_asked() -> None:
    seen: list[tuple[str, float | None]] = []
    with BackgroundJob("jobs:add", {"a": 2, "b": 3}) as child:
        assert child.result(lambda message, fraction: seen.append((message, fraction)))["sum"] == 5
    assert seen == [("adding", 0.5)]


def test_a_background_jobs_error_keeps_its_class() -> None:
    with (
        BackgroundJob("jobs:refuse", {}) as child,
        pytest.raises(InputError, match=r"^height 500 is not good: use 512"),
    ):
        child.result()


def test_a_background_job_ends_with_its_block() -> None:
    pids: list[int] = []
    with BackgroundJob("jobs:sleep", {}) as child:
        pids.append(child._process.pid)
        assert not _gone(pids[0], seconds=0.3)
    assert _gone(pids[0])
    assert not [thread for thread in child._threads if thread.is_alive()]


def test_ctrl_c_while_waiting_for_a_background_job_ends_it() -> None:
    main = threading.main_thread().ident
    assert main
    start = time.monotonic()
    with BackgroundJob("jobs:sleep", {}) as child:
        threading.Timer(0.5, signal.pthread_kill, [main, signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt, match=r"^$"):
            child.result()
    assert time.monotonic() - start < 30
    assert _gone(child._process.pid)
