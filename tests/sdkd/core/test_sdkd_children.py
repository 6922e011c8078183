"""Modules in the working folder, which may be anybody's, are not run: not by the command, and not by what it starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdkd.core.child import environment, inherited
from sdkd.core.torchrun import launch_command

REPOSITORY = Path(__file__).parents[3]
# As the installed command is: a script that lies elsewhere, so that its own search path has no working folder.
SCRIPT = """
import sys
from sdkd.core.child import run_in_child
from sdkd.compare.measure import runner as isolation

def where(progress=None):
    import signal
    return signal.__file__

if __name__ == "__main__":
    assert run_in_child("jobs:where", {}) == where()
    isolation.PRELOAD.clear()
    process = isolation._context().Process(target=where)
    isolation._start(process)
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
    own["PYTHONPATH"] = os.pathsep.join([str(hostile.parent), str(REPOSITORY)])
    words = (sys.executable, *command)
    done = subprocess.run(words, cwd=hostile, env=own, text=True, capture_output=True, check=False)
    was_run = hostile.parent / "was_run"
    assert not was_run.exists(), was_run.read_text()
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_children_run_no_module_of_the_working_folder(hostile: Path) -> None:
    script = hostile.parent / "jobs.py"
    script.write_text(SCRIPT)
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
