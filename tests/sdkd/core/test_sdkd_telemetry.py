"""SECURITY.md says "No telemetry": libraries that send it are watched from outside, with a home folder of their own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
# Both libraries at work, and time for their threads to ask for an address.
CODE = """
import time
import sdkd
import engines
from sdkd.targets.ort_providers import _smallest_graph
import onnxruntime, openvino
session = onnxruntime.InferenceSession(_smallest_graph(), providers=["CPUExecutionProvider"])
session.run(None, {"x": __import__("numpy").zeros(1, "float32")})
openvino.Core().compile_model(openvino.Core().read_model(_smallest_graph()), "CPU")
time.sleep(2)
"""


def test_no_host_is_looked_up_and_nothing_noted_down_in_the_home_folder(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    trace, home = tmp_path / "trace", tmp_path / "home"
    home.mkdir()
    tracer = ["strace", "-f", "-qq", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-o", str(trace)]
    may = (
        shutil.which("strace")
        and not subprocess.run([*tracer, "true"], check=False, stderr=subprocess.DEVNULL).returncode
    )
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LD_LIBRARY_PATH", "LANG")}
    command = [*(tracer if may else ()), sys.executable, "-P", "-c", CODE]
    subprocess.run(command, env=kept | {"HOME": str(home), "PYTHONPATH": str(REPOSITORY)}, check=True)
    assert [file.relative_to(home).as_posix() for file in home.rglob("*")] == []
    if not may:
        pytest.skip("strace shows what native code asks of the network, and may not trace here")
    assert re.findall(r"^.*(?:AF_INET|nscd).*$", trace.read_text(), re.MULTILINE) == []


def test_children_inherit_it_and_others_still_find_a_class() -> None:
    from openvino_telemetry import Telemetry

    import sdkd.core.telemetry

    assert {name: os.environ[name] for name in sdkd.core.telemetry.VARIABLES} == sdkd.core.telemetry.VARIABLES
    assert Telemetry("tool", "1.0", tid="T", backend="ga4").send_event("import", "tool", "") is None
    assert Telemetry.__module__ == "sdkd.core.telemetry"
