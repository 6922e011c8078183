"""ONNX Runtime's providers: a package that lists one is not believed until a session is there."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import torch

import sdkd.targets.ort_providers as ort_providers
from sdkd.errors import EngineError, InputError
from sdkd.targets.ort_providers import (
    CPU,
    CUDA,
    CUDA_OPTIONS,
    LIBRARY_NAMES,
    RTX,
    check_provider,
    open_session,
    provider_problem,
    usual_provider,
)
from sdkd.targets.registry import cache_folder, overlay

LISTED = ["TensorrtExecutionProvider", LIBRARY_NAMES[CUDA], LIBRARY_NAMES[CPU]]
PROFILE = {"x": [[1, 4], [2, 4], [8, 4]], "y": [[1], [1], [1]], "timestep": [[], [], []]}


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Nothing that was tried in one test is known in the next."""
    kept = (ort_providers.preload, ort_providers._warn, ort_providers._try, ort_providers._register_plugin)
    for one in kept:
        one.cache_clear()
    yield
    for one in kept:
        one.cache_clear()


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, and a package that lists CUDA; its sessions are this package's, so on the CPU."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: LISTED)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    _gpu(monkeypatch, "9.0")


def _gpu(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    monkeypatch.setattr(ort_providers, "gpu", lambda: {"gpu": "planted", "compute_capability": capability})


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """An RTX 40, and the plugin beside an onnxruntime that registers it: (name, library) of each registration."""
    registered: list[tuple[str, str]] = []
    module = ModuleType(ort_providers.PLUGIN_MODULE)
    module.__spec__ = SimpleNamespace(origin="planted")  # type: ignore[assignment]
    module.get_library_path = lambda: "plugin.so"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, ort_providers.PLUGIN_MODULE, module)
    monkeypatch.setattr(
        onnxruntime, "register_execution_provider_library", lambda *given: registered.append(given), raising=False
    )
    devices = [SimpleNamespace(ep_name=name) for name in (LIBRARY_NAMES[CPU], LIBRARY_NAMES[RTX], LIBRARY_NAMES[RTX])]
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: devices, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    _gpu(monkeypatch, "8.9")
    return registered


class Options:
    """SessionOptions that keep what they were given."""

    def __init__(self) -> None:
        self.log_severity_level = 2
        self.devices: list[Any] = []
        self.settings: dict[str, str] = {}
        self.config: dict[str, str] = {}

    def add_provider_for_devices(self, devices: list[Any], settings: dict[str, str]) -> None:
        self.devices, self.settings = devices, settings

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.config[key] = value


class Opened:
    """InferenceSession of a package with a provider: what it was given, and where it says it runs."""

    def __init__(self, provider: str = CUDA, fails: int = 0) -> None:
        self.provider, self.fails = provider, fails
        self.given: list[dict[str, Any]] = []

    def __call__(self, model: bytes, options: object, **given: Any) -> Opened:
        self.given.append(given)
        if len(self.given) <= self.fails:
            raise RuntimeError("CUDA failure 2: out of memory")
        return self

    def get_providers(self) -> list[str]:
        return [LIBRARY_NAMES[self.provider], LIBRARY_NAMES[CPU]]


def test_without_a_package_for_it_or_a_gpu_there_is_nothing_to_say(
    listed: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "get_available_providers", lambda: [LIBRARY_NAMES[CPU]])
        assert usual_provider() == CPU
        assert "is built without CUDA: pip uninstall -y onnxruntime" in str(provider_problem(CUDA))
        assert "then pip install 'sdkd[gpu]', of a version" in str(provider_problem(CUDA))
    assert provider_problem(RTX) == (
        "the TensorRT-RTX plugin of onnxruntime is not installed: pip install 'sdkd[onnxruntime-rtx]'"
    )
    monkeypatch.setattr(ort_providers, "gpu", lambda: None)
    assert usual_provider() == CPU
    assert str(provider_problem(CUDA)).startswith("torch sees no NVIDIA GPU")
    assert provider_problem(CPU) is None
    assert caplog.records == []


def test_two_packages_of_one_module_are_named_as_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    both = ["onnxruntime", "onnxruntime-gpu"]
    assert overlay(["onnxruntime"]) == ""
    assert overlay(both) == "onnxruntime and onnxruntime-gpu lie over one another"
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [LIBRARY_NAMES[CPU]])
    monkeypatch.setattr(ort_providers, "packages_of", lambda target: both)
    said = "is built without CUDA, since onnxruntime and onnxruntime-gpu lie over one another: pip uninstall -y"
    assert said in str(provider_problem(CUDA))


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider' is not in available")
def test_libraries_that_do_not_load_are_told_once_and_the_cpu_is_used(
    listed: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    def preload_dlls() -> None:
        print("Failed to load libcublasLt.so.13: cannot open shared object file")

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload_dlls)
    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0", raising=False)
    with caplog.at_level(logging.WARNING):
        assert [usual_provider(), usual_provider()] == [CPU, CPU]
    problem = str(provider_problem(CUDA))
    assert "asked for CUDAExecutionProvider and gave CPUExecutionProvider" in problem
    assert "needs CUDA 13.0" in problem
    assert "Failed to load libcublasLt.so.13" in problem
    assert problem.endswith("Install them: pip install 'sdkd[gpu]', of a version for the CUDA that torch has")
    assert [record.getMessage() for record in caplog.records] == [
        f"ONNX Runtime does not use CUDAExecutionProvider, although there is a GPU: {problem}"
    ]
    assert capsys.readouterr().out == ""
    with pytest.raises(EngineError, match=r"was asked for CUDAExecutionProvider and gave CPUExecutionProvider"):
        open_session(ort_providers._smallest_graph(), onnxruntime.SessionOptions(), CUDA)


def test_what_opens_is_on_torchs_gpu_and_is_tried_once(listed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Opened()
    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    assert [usual_provider(), usual_provider(), provider_problem(CUDA)] == [CUDA, CUDA, None]
    options = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"}
    asked = [(LIBRARY_NAMES[CUDA], {"device_id": "1", **options}), LIBRARY_NAMES[CPU]]
    assert opened.given == [{"providers": asked, "enable_fallback": 0}]


def test_what_failed_is_tried_again(listed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", Opened(fails=1))
    assert provider_problem(CUDA) == "CUDA failure 2: out of memory"
    assert provider_problem(CUDA) is None


def test_a_cpu_session_asks_for_nothing_else() -> None:
    session = open_session(ort_providers._smallest_graph(), onnxruntime.SessionOptions())
    assert session.get_providers() == [LIBRARY_NAMES[CPU]]
    assert ort_providers.preload.cache_info().currsize == 0
    with pytest.raises(InputError, match="provider 'rocm' is unknown: choose one of cpu, cuda, tensorrt-rtx"):
        check_provider("rocm")


# The plugin


def test_the_plugin_is_registered_once_and_alone_on_its_gpu(
    plugin: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    monkeypatch.setattr(onnxruntime, "InferenceSession", opened := Opened(RTX))
    assert [usual_provider(), provider_problem(RTX)] == [RTX, None]
    options = Options()
    open_session("unet.onnx", options, RTX, device=0, profile=PROFILE)  # type: ignore[arg-type]
    assert plugin == [(LIBRARY_NAMES[RTX], "plugin.so")]
    assert opened.given == [{"providers": None, "enable_fallback": 0}] * 2
    cache = cache_folder() / "onnxruntime-rtx"
    assert cache.is_dir()
    assert options.settings == {
        "nv_runtime_cache_path": str(cache),
        "nv_profile_min_shapes": "x:1x4,y:1",
        "nv_profile_opt_shapes": "x:2x4,y:1",
        "nv_profile_max_shapes": "x:8x4,y:1",
    }
    assert options.devices == [onnxruntime.get_ep_devices()[1]]
    assert options.config == {"session.disable_cpu_ep_fallback": "1"}
    with pytest.raises(EngineError, match=r"plugin of onnxruntime sees 2 GPUs, and number 2 was asked for: it is made"):
        open_session("unet.onnx", options, RTX, device=2)  # type: ignore[arg-type]


def test_a_gpu_that_the_plugin_does_not_know_uses_cuda_or_nothing(
    plugin: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _gpu(monkeypatch, "9.0")
    assert usual_provider() == CPU
    problem = str(provider_problem(RTX))
    assert problem.startswith(
        "the TensorRT-RTX plugin is made for compute capability 8.6, 8.9, 12.0 and later, and this GPU has 9.0: pip "
    )
    assert problem in caplog.text
    assert plugin == []


def test_a_plugin_that_does_not_load_says_so(plugin: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, library: str) -> None:
        raise RuntimeError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", refuse)
    assert provider_problem(RTX) == (
        "the TensorRT-RTX plugin of onnxruntime does not load: libcuda.so.1: cannot open shared object file"
    )
    monkeypatch.delattr(onnxruntime, "register_execution_provider_library")
    assert "takes no plugins: pip install 'sdkd[onnxruntime-rtx]', which brings 1.24" in str(provider_problem(RTX))


# With a GPU


def test_gpu_sessions_have_their_options() -> None:
    if LIBRARY_NAMES[CUDA] not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    assert provider_problem(CUDA) is None
    session = open_session(ort_providers._smallest_graph(), onnxruntime.SessionOptions(), CUDA)
    assert session.get_providers() == [LIBRARY_NAMES[CUDA], LIBRARY_NAMES[CPU]]
    assert {"device_id": "0", **CUDA_OPTIONS}.items() <= session.get_provider_options()[LIBRARY_NAMES[CUDA]].items()


def test_gpu_plugin_runs_a_graph() -> None:
    if provider_problem(RTX) is not None:
        pytest.skip(str(provider_problem(RTX)))
    session = open_session(ort_providers._smallest_graph(), onnxruntime.SessionOptions(), RTX)
    assert session.run(None, {"x": torch.ones(1).numpy()})[0].tolist() == [2.0]
