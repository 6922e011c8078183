"""The account of the machine, and the attention kernel that really ran."""

from __future__ import annotations

import json
import os
import platform
import socket
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

import sdkd.compare.measure.environment as surroundings
from sdkd.compare.measure.environment import attention_kernel, busy, environment, gpu_state, state_after


def test_the_account_is_json_of_what_runs_and_tells_no_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    here, later = environment("cpu"), state_after("cpu")
    text = json.dumps(here, allow_nan=False)
    assert here["cpu"]
    assert here["cores_usable"] >= 1
    assert here["threads_torch"] == torch.get_num_threads()
    assert here["python"] == platform.python_version()
    assert {"sdkd", "diffusers", "accelerate", "onnxscript"} <= set(here["versions"])
    assert here["versions"]["torch"] == torch.__version__
    assert here["versions"]["onnxruntime"] == onnxruntime.__version__
    assert onnxruntime.__version__ in here["onnxruntime_packages"].values()
    assert here["cudnn"] == (torch.backends.cudnn.version() if torch.cuda.is_available() else None)
    assert len(here["load_average"]) == 3
    assert 0 <= here["cpu_busy_percent"] <= 100
    assert here["gpu_state"] is None
    assert len(socket.gethostname()) < 4 or socket.gethostname() not in text
    assert set(later) == {"cpu_mhz_after", "cpu_busy_percent_after", "load_average_after", "gpu_state_after"}
    assert {name.removesuffix("_after") for name in later} <= set(here)

    monkeypatch.setattr(onnxruntime, "__version__", "1.99.0")
    installed = {"onnxruntime": "1.22.0", "onnxruntime-gpu": "1.99.0", "triton": "3.5.0"}
    monkeypatch.setattr(surroundings, "installed_version", installed.get)
    here = environment("cpu", load_before=[0.5, 0.25, 0.0])
    names = ("onnxruntime", "onnxruntime-gpu", "triton")
    assert [here["versions"][name] for name in names] == ["1.99.0", "1.99.0", "3.5.0"]
    assert here["onnxruntime_packages"] == {"onnxruntime": "1.22.0", "onnxruntime-gpu": "1.99.0"}
    assert here["load_average"] == [0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    ("here", "words"),
    [
        ({"load_average": [1.0, 9, 9], "cores_usable": 2, "cpu_busy_percent": 25.0}, None),
        ({"load_average": [1.2, 0, 0], "cores_usable": 2}, "its load average was 1.2 on 2 cores"),
        ({"load_average": None, "cpu_busy_percent": 40.0}, "other work kept 40% of its CPU busy"),
        (
            {"load_average": [0.6], "cores_usable": 1, "gpu_state": {"busy_percent": 90}},
            "its load average was 0.6 on 1 core and other work kept its GPU busy 90% of the time",
        ),
        ({}, None),
    ],
)
def test_a_busy_machine_is_said(here: dict[str, object], words: str | None) -> None:
    assert busy(here) == words


OWN = os.getpid()


class Nvml:
    """NVML of a GPU that does not tell its power."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return {1: 1980, 2: 2619}[kind]

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        raise self.NVMLError

    def nvmlDeviceGetPowerManagementLimit(self, handle: str) -> int:
        return 700_000

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 41

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(gpu=3)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=OWN, usedGpuMemory=5_000_000_000), SimpleNamespace(pid=1, usedGpuMemory=None)]


def test_a_gpu_is_read_by_nvml_as_far_as_it_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "nvml_device", lambda device: (Nvml(), "handle"))
    assert gpu_state("cuda") == {
        "sm_mhz": 1980, "memory_mhz": 2619, "power_limit_w": 700.0, "temperature_c": 41, "busy_percent": 3,
    }  # fmt: skip
    assert surroundings.gpu_used("cuda") == 5_000_000_000
    monkeypatch.setattr(os, "getpid", lambda: 7)  # as in a container, where NVML knows it by another number
    assert surroundings.gpu_used("cuda") is None


def test_on_a_cpu_there_is_no_gpu_memory() -> None:
    assert (surroundings.gpu_used("cpu"), surroundings.torch_peak("cpu"), gpu_state("cpu")) == (None, None, None)
    assert surroundings.peak_rss() >= surroundings.rss() // 2 > 0


def test_the_kernel_is_the_one_that_ran() -> None:
    query = torch.ones(1, 2, 8, 16)

    def fused() -> object:
        return functional.scaled_dot_product_attention(query, query, query)

    def plain() -> object:
        return (query @ query.transpose(-1, -2)).softmax(-1) @ query

    def math() -> object:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.MATH):
            return fused()

    with torch.no_grad():
        assert attention_kernel(fused) == "SDPA, flash attention (CPU)"
        assert attention_kernel(plain) == "plain matrix products and softmax"
        assert attention_kernel(math) == "SDPA, math"
        assert attention_kernel(lambda: query + 1) == "unknown"
