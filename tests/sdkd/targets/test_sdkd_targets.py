from __future__ import annotations

import importlib
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdkd.errors import InputError, MissingExtraError
from sdkd.targets import registry
from sdkd.targets.registry import (
    TARGETS,
    availability,
    built_environment,
    cache_folder,
    check_target,
    cpu_name,
    environment,
    extra_of,
    openvino_core,
    package_problem,
    packages_of,
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
        assert found.fix == (f"pip install 'sdkd[{extra_of(target)}]'" if target.extra else "pip install sdkd")


def _install(folder: Path, distribution: str, module: str) -> None:
    """What pip leaves of an installed package, as far as it says which module it has."""
    place = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (place / "top_level.txt").write_text(module)


def test_packages_that_lie_over_one_another_and_what_one_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = replace(TARGETS["onnxruntime"], module="planted_runtime")
    monkeypatch.setitem(registry.TARGETS, "onnxruntime", target)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "driver_version", lambda: None)
    assert package_problem(target) == ("is not installed", "")
    _install(tmp_path, "planted-runtime", "planted_runtime")
    _install(tmp_path, "planted-runtime-gpu", "planted_runtime")
    (tmp_path / "planted_runtime").mkdir()
    (tmp_path / "planted_runtime" / "__init__.py").write_text("__version__ = '1.0'")
    importlib.invalidate_caches()
    assert packages_of(target) == ["planted-runtime", "planted-runtime-gpu"]
    assert package_problem(target) is None
    assert require("onnxruntime").__version__ == "1.0"
    monkeypatch.delitem(sys.modules, "planted_runtime")
    (tmp_path / "planted_runtime" / "__init__.py").unlink()
    importlib.invalidate_caches()
    found = availability("onnxruntime")
    assert (found.can_build, found.can_run, found.version) == (False, False, None)
    assert found.fix == "pip uninstall -y planted-runtime planted-runtime-gpu, then pip install 'sdkd[cpu]'"
    lost = r"the check of 1 needs the package 'planted_runtime', which has lost files, since .* was removed. Install it"
    with pytest.raises(MissingExtraError, match=lost):
        require("onnxruntime", "the check of 1")


def test_the_extra_of_onnxruntime_is_that_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, extra in ((None, "cpu"), ("580.65.06", "gpu")):
        monkeypatch.setattr(registry, "driver_version", lambda version=version: version)
        assert extra_of(TARGETS["onnxruntime"]) == extra
        assert extra_of(TARGETS["openvino"]) == "openvino"


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
