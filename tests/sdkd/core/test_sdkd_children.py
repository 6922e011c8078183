"""Child processes: results, progress, errors, crashes, Ctrl-C, a parent that dies; no module of the working folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from sdkd.core.child import BackgroundJob, ChildError, Failure, environment, inherited, run_in_child
from sdkd.core.torchrun import launch_command
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


def test_our_errors_and_those_of_the_system_stay_what_they_are() -> None:
    with pytest.raises(InputError, match=r"^height 500 is not good: use 512") as caught:
        run_in_child("jobs:refuse", {})
    assert str(caught.value) == "height 500 is not good: use 512"
    assert "in refuse" in caught.value.__notes__[0]  # where, for --debug
    with pytest.raises(OSError, match="No space left on device") as full:
        run_in_child("jobs:full", {})
    assert (full.value.errno, full.value.filename) == (28, "engine")


def test_other_errors_carry_a_bounded_tail_of_what_was_printed() -> None:
    with pytest.raises(ChildError, match=r"^RuntimeError: it broke") as caught:
        run_in_child("jobs:fail", {})
    assert caught.value.tail[-1] == "[E] the library's last word"
    assert len(caught.value.tail) == 200
    assert max(map(len, caught.value.tail)) <= 2000
    assert "in fail" in caught.value.__notes__[0]


class OddError(RangeError):
    """Of no class that the other side knows."""


def test_errors_cross_the_border_of_processes() -> None:
    missing = FileNotFoundError(2, "No such file or directory", "x.json")
    for error in (RangeError("too large"), MissingExtraError("openvino", "openvino", "target"), missing, OddError("x")):
        found = Failure(**json.loads(json.dumps(asdict(Failure.of(error))))).error(ChildError)
        assert type(found) is (RangeError if type(error) is OddError else type(error))
        assert str(found) == str(error)
        assert getattr(found, "extra", "") == getattr(error, "extra", "")


def test_an_unknown_function_is_an_error() -> None:
    with pytest.raises(ChildError, match="ModuleNotFoundError: No module named 'nowhere'"):
        run_in_child("nowhere:build", {})


def test_a_crash_is_one_clear_error() -> None:
    why = {"SIGKILL": "the system most likely ran out of memory", "SIGSEGV": "the library crashed"}
    for name, cause in why.items():
        with pytest.raises(ChildError, match=f"ended by {name}: {cause}") as caught:
            run_in_child("jobs:end", {"name": name})
        assert caught.value.ended_by == name
    with pytest.raises(ChildError, match="ended with status 3 and no result"):
        run_in_child("jobs:leave", {})


def interrupt() -> None:
    main = threading.main_thread().ident
    assert main
    threading.Timer(0.2, signal.pthread_kill, [main, signal.SIGINT]).start()


def fail() -> None:
    raise ValueError("no terminal")


@pytest.mark.parametrize(("act", "error"), [(interrupt, KeyboardInterrupt), (fail, ValueError)])
def test_ctrl_c_in_the_parent_and_a_progress_that_fails_end_the_child(
    act: Callable[[], None], error: type[BaseException]
) -> None:
    child: list[int] = []

    def progress(message: str, fraction: float | None) -> None:
        child.append(int(message))
        act()

    with pytest.raises(error, match=r"^$|no terminal"):
        run_in_child("jobs:sleep", {}, progress)
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


def test_a_background_job_ends_with_its_block() -> None:
    pids: list[int] = []
    with BackgroundJob("jobs:sleep", {}) as child:
        pids.append(child._process.pid)
        assert not _gone(pids[0], seconds=0.3)
    assert _gone(pids[0])
    assert not [thread for thread in child._threads if thread.is_alive()]


# As the installed command is: a script that lies elsewhere, so that its own search path has no working folder.
HOSTED = """
import sys
from sdkd.core.child import run_in_child
from sdkd.core import processes

def where(progress=None):
    import signal
    return signal.__file__

if __name__ == "__main__":
    assert run_in_child("jobs:where", {}) == where()
    process = processes.context([]).Process(target=where)
    processes.start(process, [])
    process.join()
    sys.exit(process.exitcode)
"""


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    folder = tmp_path / "downloads"
    (folder / "sdkd").mkdir(parents=True)
    for name in ("signal.py", "torch.py", "typing.py", "sdkd/__init__.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'was_run')!r}, 'a').write(__file__); raise SystemExit(3)")
    return folder


def run(hostile: Path, *command: str) -> str:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    own["PYTHONPATH"] = os.pathsep.join([str(hostile.parent), str(ROOT)])
    words = (sys.executable, *command)
    done = subprocess.run(words, cwd=hostile, env=own, text=True, capture_output=True, check=False)
    was_run = hostile.parent / "was_run"
    assert not was_run.exists(), was_run.read_text()
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_children_run_no_module_of_the_working_folder(hostile: Path) -> None:
    script = hostile.parent / "jobs.py"
    script.write_text(HOSTED)
    run(hostile, str(script))


def test_the_command_as_a_module_leaves_the_working_folder(hostile: Path) -> None:
    (hostile / "sdkd" / "__init__.py").unlink()
    assert run(hostile, "-m", "sdkd.cli", "--version").startswith("sdkd ")


def test_the_launcher_and_what_it_launches_get_the_safe_path(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch_command(2, ["cache"])[1:4] == ["-P", "-m", "torch.distributed.run"]
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "/mine"]))
    assert environment()["PYTHONSAFEPATH"] == "1"
    assert "" not in environment()["PYTHONPATH"].split(os.pathsep)
    with inherited():
        assert os.environ["PYTHONSAFEPATH"] == "1"
    assert "PYTHONSAFEPATH" not in os.environ
    assert os.environ["PYTHONPATH"] == os.pathsep.join(["", "/mine"])
