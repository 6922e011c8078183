"""`sdkd doctor`: what is here, what is missing, and the command that brings it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import sdkd.commands.doctor as command
import sdkd.targets.ort_providers as ort_providers
from sdkd.commands.doctor import doctor, examine
from sdkd.targets.nvidia import DRIVERS, cuda_packages, driver_cuda, driver_version, gpu, gpu_problem
from sdkd.targets.registry import TARGETS, availability, timing_cache

app = typer.Typer()
app.command()(doctor)


def _run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


@pytest.mark.parametrize(
    ("driver", "runs", "needs", "torch_cuda", "reason", "fix"),
    [
        (None, None, {"tensorrt_cu13": 13}, None, "no NVIDIA driver here", "install its driver, 580.65.06 or later"),
        (None, None, {"tensorrt_cu12": 12}, None, "no NVIDIA driver here", "install its driver, 525.60.13 or later"),
        (None, None, {}, "13.0", "no NVIDIA driver here", "580.65.06 or later"),
        ("550.54", None, {}, None, "NVIDIA driver 550.54 without libcuda.so.1", "install the driver's user part"),
        (
            "550.54", (12, 4), {"tensorrt_rtx_cu13": 13}, "12.8",
            "NVIDIA driver 550.54 runs CUDA 12.4, and tensorrt_rtx_cu13 needs CUDA 13",
            "update the driver to 580.65.06 or later, or: pip install tensorrt_rtx_cu12",
        ),
        (
            "550.54", (12, 4), {"tensorrt_cu12": 12}, "13.0",
            "NVIDIA driver 550.54 runs CUDA 12.4, and torch for CUDA 13.0 needs CUDA 13",
            "update the driver to 580.65.06 or later",
        ),
        (
            "580.65.06", (13, 0), {"tensorrt_cu13": 13}, None,
            "NVIDIA driver 580.65.06 runs CUDA 13.0, but this torch is built without CUDA", "install torch with CUDA",
        ),
        (None, (13, 0), {}, "13.0", "NVIDIA driver of unknown version runs CUDA 13.0, and torch sees no device", "see"),
    ],
)  # fmt: skip
def test_which_driver_is_wrong(
    driver: str | None,
    runs: tuple[int, int] | None,
    needs: dict[str, int],
    torch_cuda: str | None,
    reason: str,
    fix: str,
) -> None:
    found = gpu_problem(driver, runs, needs, torch_cuda)
    assert found[0] == reason
    assert fix in found[1]


def test_packages_say_their_cuda() -> None:
    pytest.importorskip("tensorrt_rtx")
    assert set(cuda_packages("tensorrt_rtx").values()) <= set(DRIVERS)
    assert cuda_packages("tensorrt_rtx")
    assert cuda_packages("onnx") == {}
    assert not any("rtx" in name for name in cuda_packages("tensorrt"))  # the other library's


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    assert timing_cache("tensorrt") == ""
    found = availability("tensorrt-rtx")
    if found.version:
        assert (found.can_build, found.can_run) == (True, False)
        assert "NVIDIA driver" in found.reason
        assert found.fix


def test_gpu_driver_and_timing_cache() -> None:
    version, runs = driver_version(), driver_cuda()
    assert version
    assert runs
    assert runs >= (11, 0)
    if availability("tensorrt").version:
        assert timing_cache("tensorrt").startswith("timing-")
        assert version in timing_cache("tensorrt")


def test_for_programs() -> None:
    found = json.loads(_run("--json").stdout)
    assert [row["target"] for row in found["targets"]] == list(TARGETS)
    assert found["libraries"]["torch"] == torch.__version__
    assert "CPU" in found["onnxruntime_providers"]
    assert found["gpu"]["torch_cuda"] == torch.version.cuda
    assert set(found) == set(examine())


def test_precisions_that_are_fast_here_and_on_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "cpu_flags", lambda: {"avx2", "avx_vnni"})
    monkeypatch.setenv("COLUMNS", "80")
    found = json.loads(_run("--json", "--gpu", "8.6").stdout)["precisions"]
    assert [row["precision"] for row in found["cpu"] if row["fast"]] == ["fp32", "int8"]
    assert [row["precision"] for row in found["gpu"] if row["fast"]] == ["fp32", "fp16", "bf16", "int8"]
    assert found["int8_weight_bits"] == 8
    said = _run("--details", "--gpu", "8.6").stdout
    assert "fp32, int8 (avx_vnni)" in said
    assert "fp32, fp16, bf16, int8 " in said
    assert "needs compute capability 8.9" in said
    assert gpu() or examine()["precisions"]["gpu"] is None
    assert "needs compute capability" not in _run().stdout


def test_the_targets_of_another_gpu_are_said_with_their_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    found = json.loads(_run("--json", "--gpu", "9.0").stdout)["gpu_targets"]
    assert {(row["target"], row["way"]): row["runs"] for row in found} == {
        ("tensorrt", ""): True, ("tensorrt-rtx", ""): False, ("inductor", ""): True, ("onnxruntime", "CUDA"): True,
        ("onnxruntime", "TensorRT-RTX plugin"): False,
    }  # fmt: skip
    assert all(row["source"] for row in found)
    said = _run("--gpu", "9.0").stdout
    assert "Compute capability 9.0 (Hopper: H100, H200, GH200)" in said
    assert gpu() or examine()["gpu_targets"] == []


def test_how_onnxruntime_runs_on_the_gpu_is_told_for_each_of_its_ways(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu() or examine()["onnxruntime_on_gpu"] == {}
    problems = {"tensorrt-rtx": "the plugin is not there", "cuda": None}
    monkeypatch.setattr(ort_providers, "provider_problem", problems.__getitem__)
    monkeypatch.setattr(command, "gpu", lambda: {"gpu": "planted", "compute_capability": "8.9"})
    monkeypatch.setattr(command, "_gpu", lambda: {"gpu": "planted"})
    monkeypatch.setattr(command, "gpu_support", list)
    assert command.providers_on_gpu() == problems
    command.doctor()
    said = " ".join(capsys.readouterr().out.split())
    assert "onnxruntime by tensorrt-rtx: the plugin is not there onnxruntime by cuda: runs on this GPU" in said


def test_packages_that_lie_over_one_another_are_told_with_the_repair(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert examine()["packages"] == []
    monkeypatch.setattr(command, "packages_of", lambda target: ["onnxruntime", "onnxruntime-gpu"])
    monkeypatch.setattr(command, "extra_of", lambda target: "gpu")
    command.doctor()
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "onnxruntime: onnxruntime and onnxruntime-gpu lie over one another: pip uninstall -y onnxruntime "
        "onnxruntime-gpu, then pip install 'sdkd[gpu]'"
    ) in said


def test_for_people_in_80_columns() -> None:
    root = Path(__file__).parents[3]
    code = "import sys; sys.argv = ['sdkd', 'doctor', '--details']; from sdkd.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env={"COLUMNS": "80", "PATH": ""}
    )
    assert done.returncode == 0, done.stderr
    short = _run().stdout
    for target in TARGETS.values():  # what is missing comes with its pip command
        found = availability(target.name)
        assert found.version or f"  {target.name}: {found.fix}" in short
    for said in (done.stdout, short):
        tables = [line for line in said.splitlines() if line[:1] in "┃│┏┡├└"]
        assert tables
        assert max(map(len, tables)) <= 80
        assert "onnxruntime for" in said
    assert "diffusers" in done.stdout
    assert "diffusers" not in short
