from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from safetensors import SafetensorError
from typer.testing import CliRunner

from sdkd import cli
from sdkd.errors import MissingExtraError, ModelError

HEAVY = {"torch", "diffusers", "transformers", "tensorrt", "tensorrt_rtx", "onnx", "onnxruntime", "openvino", "numpy"}


def test_importing_loads_nothing_heavy() -> None:
    packages = "sdkd, export, engines, sdkd.cli, sdkd.students, sdkd.bundle.manifest, sdkd.core.contract"
    code = f"import {packages}, sys; print(' '.join(m for m in sys.modules if '.' not in m))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY & set(loaded)


def test_every_command_is_summarised_and_loads() -> None:
    assert set(cli._entry_points()) == set(cli.SUMMARIES)
    for name in cli.SUMMARIES:
        assert cli.load_command(name).help.strip()


def _status(function: Callable[[], Any]) -> int | str | None:
    with pytest.raises(SystemExit, match=r"^\d+$") as caught:
        cli.guarded(function)()
    return caught.value.code


def _raiser(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ModelError("'x' is no pipeline: give a diffusers folder"), 1, "sdkd: 'x' is no pipeline: give a diffusers"),
        (MissingExtraError("openvino", "openvino", "target 'openvino'"), 1, "pip install 'sdkd[openvino]'"),
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), 1, "the disk is full while writing '/a/b'"),
        (PermissionError(errno.EACCES, "Permission denied", "/srv/x"), 1, "no permission for '/srv/x'"),
        (OSError(errno.EROFS, "x", "/ro/a"), 1, "'/ro/a' is on a read-only file system: choose another folder"),
        (IsADirectoryError(errno.EISDIR, "x", "/a"), 1, "'/a' is a folder, and a file is wanted"),
        (NotADirectoryError(errno.ENOTDIR, "x", b"/a/b"), 1, "'/a/b' is no folder, or lies below a file"),
        (OSError(errno.ENAMETOOLONG, "x", "/a"), 1, "'/a' has too long a name: give a shorter one"),
        (OSError(errno.EIO, "x", "/a"), 1, "the disk answers with errors while writing '/a'"),
        (FileNotFoundError(errno.ENOENT, "x", "/a"), 1, "'/a' does not exist"),
        (OSError("Can't load\n the tokenizer"), 1, "Can't load the tokenizer: look at the file or connection"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 1, "the disk is full: free some space"),
        (SafetensorError("Error: Input/output error (os error 5)"), 1, "the disk answers with errors: look at"),
        (SafetensorError("header too small"), 1, "a .safetensors file cannot be read or written (header too small)"),
        (RuntimeError("[ONNXRuntimeError] : 1 : FAIL : No space left on device"), 1, "the disk is full: free some"),
        (MemoryError(), 1, "the memory is full: close other programs, or ask for fewer images"),
        (RecursionError("maximum recursion depth exceeded"), 1, "something that was given is nested too deeply"),
        (UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "unexpected end"), 1, "a text is not utf-8 (byte 0: unexpected"),
        (UnicodeEncodeError("ascii", "\u00e9", 0, 1, "no"), 1, "a text cannot be written here"),
        (KeyboardInterrupt(), 130, "interrupted: nothing half-written was kept"),
    ],
)
def test_an_error_is_one_message_and_a_status(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _status(_raiser(error)) == status
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError, match="ours"):
        cli.guarded(_raiser(ZeroDivisionError("ours")))()


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["export", "demo", "out", "--controlnet", "a", "--precision", "fp16", "--controlnet", "b"], "--controlnet"),
        (["build-engine", "bundle", "-t", "onnxruntime", "--target", "openvino"], "--target / -t"),
        (["cache", "demo", "demo", "out", "--text", "--no-text"], "--text / --no-text"),
    ],
)
def test_an_option_given_twice_is_refused_where_one_value_would_be_lost(words: list[str], option: str) -> None:
    found = CliRunner().invoke(cli.app, words)
    assert found.exit_code == 2
    assert f"Option '{option}' is given 2 times: give it once." in found.output


def test_help_and_bad_usage_leave_with_their_status() -> None:
    sdkd = [sys.executable, "-m", "sdkd.cli"]
    narrow = os.environ | {"COLUMNS": "0", "PYTHONIOENCODING": "ascii"}
    shown = subprocess.run([*sdkd, "--help"], capture_output=True, text=True, check=False, env=narrow)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert all(name in shown.stdout for name in cli.SUMMARIES)
    wrong = CliRunner().invoke(cli.app, ["nonsense"])
    assert wrong.exit_code == 2
    assert "No such command 'nonsense'" in wrong.stderr
