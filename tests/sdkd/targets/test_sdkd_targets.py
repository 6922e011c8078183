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
)
from sdkd.targets.registry import slot_precision as precision_of


def test_a_slot_names_its_target_and_precision() -> None:
    assert check_target("openvino-bf16").name == "openvino"
    assert check_target("tensorrt-rtx").name == "tensorrt-rtx"
    assert precision_of("openvino-bf16") == "bf16"
    assert precision_of("tensorrt-rtx") is None
    assert slot_name("openvino", "bf16", "fp32") == "openvino-bf16"
    assert slot_name("onnxruntime", "fp32", "fp32") == "onnxruntime"


def test_an_unknown_target_lists_the_known() -> None:
    with pytest.raises(InputError, match="target 'coreml' is unknown: choose one of onnxruntime, openvino, tensorrt"):
        check_target("coreml")


@pytest.mark.parametrize("name", TARGETS)
def test_a_missing_module_names_the_pip_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def hidden(module: str, package: str | None = None) -> Any:
        if module == TARGETS[name].module:
            raise ImportError(f"No module named {module!r}")
        return real(module, package)

    monkeypatch.setattr(importlib, "import_module", hidden)
    with pytest.raises(MissingExtraError, match=r"is not installed\. Install it with: pip install 'sdkd\["):
        require(name)
    assert not availability(name).can_build


def test_the_environment_names_version_and_platform() -> None:
    import onnxruntime

    found = environment("onnxruntime")
    assert found["onnxruntime"] == onnxruntime.__version__
    assert "-" in found["platform"]
    assert "compute_capability" not in built_environment("onnxruntime")


def test_onnxruntime_is_always_ready() -> None:
    found = availability("onnxruntime")
    assert (found.can_build, found.can_run, found.reason) == (True, True, "ready")


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


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: sse2 avx2 avx512_bf16\n", "AMD EPYC (avx512_bf16)"),
        ("processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: sse2 avx2\n", "AMD EPYC (avx2)"),
        ("processor\t: 0\nmodel name\t: Old\nflags\t\t: sse2\n", "Old"),
    ],
)
def test_cpus_of_one_name_and_other_units_are_told_apart(text: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(text)

    assert cpu_name(tmp_path / "cpuinfo") == name


def test_a_cpu_has_a_name_where_the_kernel_tells_none(tmp_path: Path) -> None:
    assert cpu_name(tmp_path / "missing") == (platform.processor() or platform.machine())


def test_caches_are_the_users_and_not_the_bundles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    assert cache_folder() == Path("/some/where/sdkd")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "sdkd"
