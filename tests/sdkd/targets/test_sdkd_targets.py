from __future__ import annotations

import importlib
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdkd.errors import InputError, MissingExtraError
from sdkd.targets.registry import (
    TARGETS,
    availability,
    built_environment,
    cache_folder,
    check_target,
    cpu_name,
    environment,
    openvino_core,
    require,
    slot_name,
    slot_precision,
)


def test_a_slot_names_its_target_and_precision() -> None:
    slots = ("openvino-bf16", "tensorrt-rtx", "onnxruntime-int8", "tensorrt-rtx-fp8")
    assert [check_target(slot).name for slot in slots] == ["openvino", "tensorrt-rtx", "onnxruntime", "tensorrt-rtx"]
    assert [slot_precision(slot) for slot in slots] == ["bf16", None, "int8", "fp8"]
    assert slot_name("openvino", "bf16", "fp32") == "openvino-bf16"
    assert slot_name("onnxruntime", "fp32", "fp32") == "onnxruntime"
    with pytest.raises(InputError, match="target 'coreml' is unknown: choose one of onnxruntime, openvino, tensorrt"):
        check_target("coreml")


def test_a_missing_module_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real, hidden = importlib.import_module, {target.module for target in TARGETS.values()}

    def import_module(module: str, package: str | None = None) -> Any:
        if module in hidden:
            raise ImportError(f"No module named {module!r}")
        return real(module, package)

    monkeypatch.setattr(importlib, "import_module", import_module)
    for name, target in TARGETS.items():
        with pytest.raises(MissingExtraError, match=r"is not installed\. Install it with: pip install 'sdkd\["):
            require(name)
        found = availability(name)
        assert not found.can_build
        assert found.fix == (f"pip install 'sdkd[{target.extra}]'" if target.extra else "pip install sdkd")


def test_the_environment_names_version_and_platform() -> None:
    import onnxruntime

    found = environment("onnxruntime")
    assert found["onnxruntime"] == onnxruntime.__version__
    assert "-" in found["platform"]
    ready = availability("onnxruntime")
    assert (ready.can_build, ready.can_run, ready.reason) == (True, True, "ready")
    assert "compute_capability" not in built_environment("onnxruntime")


def test_signals_still_arrive_after_openvino_was_used() -> None:
    code = (
        "import gc, os, signal\n"
        "from sdkd.targets.registry import openvino_core\n"
        "first, second = openvino_core(), openvino_core()\n"
        "for core in (first, second): core.get_property('CPU', 'OPTIMIZATION_CAPABILITIES')\n"
        "del core, first; gc.collect(); del second; gc.collect()\n"  # in the order in which they came
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    print('not interrupted')\n"
        "except KeyboardInterrupt:\n    print('interrupted')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "interrupted")
    assert openvino_core() is openvino_core()


def test_cpus_of_one_name_and_other_units_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    for flags, name in {
        "sse2 avx2 avx512_bf16": "AMD EPYC (avx512_bf16)",
        "sse2 avx2": "AMD EPYC (avx2)",
        "sse2": "AMD EPYC",
    }.items():
        file.write_text(f"processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: {flags}\n")
        assert cpu_name(file) == name
    assert cpu_name(tmp_path / "missing") == (platform.processor() or platform.machine())


def test_caches_are_the_users_and_not_the_bundles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    assert cache_folder() == Path("/some/where/sdkd")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "sdkd"
