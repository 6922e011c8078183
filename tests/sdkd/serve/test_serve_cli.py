"""`sdkd serve` as a command: what it refuses before it listens, and its life as a process."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_bundles import edit_engine
from made_once import made_once
from small_bundles import small_pipeline
from typer.testing import CliRunner

from sdkd.cli import app
from sdkd.serve.catalog import make_catalog


def run(*words: object) -> Any:
    return CliRunner().invoke(app, ["serve", *map(str, words)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{bundle}", "--host", "0.0.0.0"], "host '0.0.0.0' can be reached by others: give --api-key KEY"),
        (["{bundle}", "--host", "nowhere.invalid", "--no-auth"], "host 'nowhere.invalid' is no address"),
        (["nothing-here"], "model 'nothing-here' does not exist"),
        (["{bundle}", "{bundle}"], "two models are called 'engines-of-two': give one another name, such as other="),
        (["a/b={bundle}"], "name 'a/b' of a model is not usable"),
        (["{bundle}", "--target", "tensorflow"], "target 'tensorflow' is unknown"),
        (["{bundle}", "--lora-dir", "nothing-here"], "LoRA folder 'nothing-here' is no folder"),
        (["{bundle}", "--output", __file__], "is a file: give a folder"),
        (["{bundle}", "--memory-gb", "0.1"], "model 'engines-of-two' needs about"),
        (["{bundle}", "--memory-gb", "nan"], "memory gb nan is not finite"),
        (["{bundle}", "--api-key", " x\u00e9"], "the API key is empty or not ASCII"),
        (["{bundle}", "--drain-seconds", "inf"], "drain seconds inf is not finite"),
    ],
)
def test_what_is_refused(bundle: Path, words: list[str], said: str) -> None:
    done = run(*(word.format(bundle=bundle) for word in words), "--port", 0)
    assert (done.exit_code, said in done.output) == (1, True), done.output


def test_a_port_in_use(bundle: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run(bundle, "--port", port)
    assert (done.exit_code, f"port {port} of 127.0.0.1 is in use: give --port" in done.output) == (1, True)


def test_a_stale_bundle(bundle: Path, tmp_path: Path) -> None:
    """Where one target is stale the other is served, and where both are, nothing."""
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    record = edit_engine(copy, "openvino", "unet", onnx_sha256="0" * 64).engine("openvino", "unet")
    assert [served.id for served in make_catalog([str(copy)]).all] == ["copy"]
    assert make_catalog([str(copy)]).default.target == "onnxruntime"
    edit_engine(copy, "onnxruntime", "unet", onnx_sha256=replace(record).onnx_sha256)
    done = run(copy, "--port", 0)
    assert (done.exit_code, "no engine of" in done.output, "sdkd build-engine" in done.output) == (1, True, True)


def test_any_model_is_served_eagerly(tmp_path: Path) -> None:
    folder = made_once("folder", lambda path: small_pipeline().save_pretrained(path))
    (served,) = make_catalog([f"eager={folder}"]).all
    assert (served.id, served.target, served.ranges, served.size) == ("eager", "eager", (), (32, 32))
    assert served.takes == ("text", "image", "mask")


@pytest.mark.slow
def test_its_life_as_a_process(bundle: Path) -> None:
    """It says where it is, draws, and ends in order: 0, with its processes gone."""
    command = [sys.executable, "-m", "sdkd.cli", "serve", f"small={bundle}", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            lines = [process.stdout.readline() for _ in range(3)]
            assert lines[0].startswith("small: openvino, 32x32 px (width x height), 25 steps, guidance 7.5")
            found = re.search(r"page (http://127\.0\.0\.1:\d+)/", lines[2])
            assert found
            body = json.dumps({"prompt": "a cat", "steps": 2, "seed": 1}).encode()
            request = urllib.request.Request(f"{found[1]}/api/images", body, {"content-type": "application/json"})
            with urllib.request.urlopen(request, timeout=120) as answer:
                assert json.load(answer)["images"][0]["seed"] == 1
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            assert process.stderr
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()
