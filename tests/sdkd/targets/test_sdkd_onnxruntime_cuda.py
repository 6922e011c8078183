"""ONNX Runtime with CUDA: a package that lists it is not believed until a session is there."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import onnxruntime
import pytest
import torch

import sdkd.targets.ort_cuda as ort_cuda
from sdkd.errors import EngineError
from sdkd.targets.ort_cuda import CPU, CUDA, cuda_problem, open_session, providers, runs_on_cuda

LISTED = ["TensorrtExecutionProvider", CUDA, CPU]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Nothing that was tried in one test is known in the next."""
    kept = (ort_cuda.preload, ort_cuda._warn, ort_cuda._try_cuda)
    for one in kept:
        one.cache_clear()
    yield
    for one in kept:
        one.cache_clear()


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, and a package that lists CUDA; its sessions are this package's, so on the CPU."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: LISTED)
    monkeypatch.setattr(ort_cuda, "gpu", lambda: {"gpu": "planted", "compute_capability": "9.0"})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


class Opened:
    """InferenceSession of a package with CUDA: what it was given, and where it says it runs."""

    def __init__(self, fails: int = 0) -> None:
        self.given: list[dict[str, Any]] = []
        self.fails = fails

    def __call__(self, model: bytes, options: object, **given: Any) -> Opened:
        self.given.append(given)
        if len(self.given) <= self.fails:
            raise RuntimeError("CUDA failure 2: out of memory")
        return self

    def get_providers(self) -> list[str]:
        return [CUDA, CPU]


def test_without_cuda_in_the_package_or_a_gpu_there_is_nothing_to_say(
    listed: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
        assert not runs_on_cuda()
        assert "is built without CUDA: pip uninstall onnxruntime, then pip install" in str(cuda_problem())
    monkeypatch.setattr(ort_cuda, "gpu", lambda: None)
    assert not runs_on_cuda()
    assert str(cuda_problem()).startswith("torch sees no NVIDIA GPU")
    assert caplog.records == []


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider' is not in available")
def test_libraries_that_do_not_load_are_told_once_and_the_cpu_is_used(
    listed: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    def preload_dlls() -> None:
        print("Failed to load libcublasLt.so.13: cannot open shared object file")

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload_dlls)
    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0", raising=False)
    with caplog.at_level(logging.WARNING):
        assert [runs_on_cuda(), runs_on_cuda()] == [False, False]
    problem = str(cuda_problem())
    assert "asked for CUDA and gave CPUExecutionProvider" in problem
    assert "needs CUDA 13.0" in problem
    assert "Failed to load libcublasLt.so.13" in problem
    assert problem.endswith("pip install 'onnxruntime-gpu[cuda,cudnn]', of a version for the CUDA that torch has")
    assert [record.getMessage() for record in caplog.records] == [
        f"ONNX Runtime runs on the CPU, although there is a GPU: {problem}"
    ]
    assert capsys.readouterr().out == ""
    with pytest.raises(EngineError, match=r"was asked for CUDA and gave CPUExecutionProvider"):
        open_session(ort_cuda._smallest_graph(), onnxruntime.SessionOptions(), cuda=True)


def test_what_opens_is_on_torchs_gpu_and_is_tried_once(listed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Opened()
    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    assert [runs_on_cuda(), runs_on_cuda(), cuda_problem()] == [True, True, None]
    assert [given["enable_fallback"] for given in opened.given] == [0]
    assert opened.given[0]["providers"] == providers(True, 1)
    options = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"}
    assert providers(True, 1) == [(CUDA, {"device_id": "1", **options}), CPU]
    assert providers(False) == [CPU]


def test_what_failed_is_tried_again(listed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", Opened(fails=1))
    assert cuda_problem() == "CUDA failure 2: out of memory"
    assert cuda_problem() is None


def test_a_cpu_session_asks_for_nothing_else() -> None:
    session = open_session(ort_cuda._smallest_graph(), onnxruntime.SessionOptions())
    assert session.get_providers() == [CPU]
    assert ort_cuda.preload.cache_info().currsize == 0


def test_gpu_sessions_have_their_options() -> None:
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    assert cuda_problem() is None
    session = open_session(ort_cuda._smallest_graph(), onnxruntime.SessionOptions(), cuda=True)
    assert session.get_providers() == [CUDA, CPU]
    assert {"device_id": "0", **ort_cuda.OPTIONS}.items() <= session.get_provider_options()[CUDA].items()
