"""TensorRT's contexts, refits and settings without a GPU: small objects stand for the library's, which need one."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engines.modules.components import _one_timestep, _scalar
from engines.sessions.out_of_memory import CAPTURING
from engines.sessions.trt.context import BoundContext, Call
from engines.sessions.trt.cuda_graphs import Buffers, ShapeGraph
from engines.sessions.trt.opening import captures_by_itself, configure_graphs
from engines.sessions.trt.refit import HalfRefitError, refit
from engines.sessions.trt.runtime_cache import RuntimeCache
from sdkd.core.collection import paused_gc
from sdkd.errors import EngineError

STREAM: Any = SimpleNamespace(cuda_stream=0)
PROFILE_BYTES = 4096


class Context:
    """An execution context for one input and one output of the same shape, which records its workspaces."""

    active_optimization_profile = 0

    def __init__(self, needed: int = 512) -> None:
        self.needed, self.workspaces, self.shape = needed, [], ()  # type: ignore[var-annotated]
        self.engine = SimpleNamespace(get_device_memory_size_for_profile_v2=lambda _: PROFILE_BYTES)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return True

    def infer_shapes(self) -> list[str]:
        if self.shape[0] == 13:
            raise RuntimeError("Error while\n trying to infer shapes.")
        return ["sample"] if self.shape[0] == 14 else []

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.active_optimization_profile = profile
        return profile == 1

    def update_device_memory_size_for_shapes(self) -> int:
        return self.needed

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def set_device_memory(self, address: int, size: int) -> None:
        self.workspaces.append((address, size))


def failed(what: str) -> EngineError:
    return EngineError(f"the engine: {what} failed")


def call(size: int, profile: int = 0) -> Call:
    return Call({"sample": torch.zeros(size)}, {"out": torch.zeros(size)}, profile, {"sample": (size,)})


def test_the_workspace_is_set_again_after_every_change_of_shapes() -> None:
    context, block = Context(), torch.empty(512, dtype=torch.uint8)
    bound = BoundContext(context, True, failed)
    for size in (2, 2, 3, 2):  # the second is in a steady loop
        bound.prepare(call(size), STREAM)
        bound.set_workspace(block)
    assert context.workspaces == [(block.data_ptr(), 512)] * 3
    bound.prepare(call(5), STREAM)
    bound.set_workspace(None)
    assert context.workspaces[3:] == [(0, 0)]
    bound.prepare(call(5, profile=0), STREAM)
    bound.set_workspace(None)
    assert len(context.workspaces) == 4


def test_a_context_with_memory_of_its_own_is_given_none() -> None:
    context = Context()
    bound = BoundContext(context, False, failed)
    bound.prepare(call(2), STREAM)
    bound.set_workspace(None)
    assert (bound.needed, context.workspaces) == (0, [])


@pytest.mark.parametrize(("answer", "needed"), [(512, 512), (0, PROFILE_BYTES)])
def test_memory_is_never_less_than_what_is_needed(answer: int, needed: int) -> None:
    bound = BoundContext(Context(answer), True, failed)
    bound.prepare(call(2), STREAM)
    assert bound.needed == needed


def test_what_the_bindings_raise_names_the_step_that_failed() -> None:
    bound = BoundContext(Context(), True, failed)
    with pytest.raises(EngineError, match=r"inferring shapes \(Error while trying to infer shapes\.\) failed$"):
        bound.prepare(call(13), STREAM)
    with pytest.raises(EngineError, match=r"inferring shapes of sample failed$"):
        bound.prepare(call(14), STREAM)
    bound.prepare(call(2, profile=1), STREAM)
    with pytest.raises(EngineError, match=r"selecting optimization profile 2 failed$"):
        bound.prepare(call(3, profile=2), STREAM)


# Weights


class Refitter:
    """A refitter for an engine that has merged `scale` into `kernel`: who changes one has to give both."""

    def __init__(self, engine: set[str], logger: Any) -> None:
        if not engine:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.names, self.given = engine, {}  # type: ignore[var-annotated]

    def get_all_weights(self) -> list[str]:
        return sorted(self.names)

    def set_named_weights(self, name: str, weights: tuple[str, int, int]) -> bool:
        self.given[name] = weights
        return True

    def get_missing_weights(self) -> list[str]:
        return sorted(self.names - set(self.given)) if self.given else []

    def refit_cuda_engine(self) -> bool:
        REFITTED.append(dict(self.given))
        return True


REFITTED: list[dict[str, tuple[str, int, int]]] = []
TRT: Any = SimpleNamespace(
    Refitter=Refitter,
    DataType=SimpleNamespace(FLOAT="float", HALF="half"),
    Weights=lambda kind, address, count: (kind, address, count),
)


def test_a_refit_gives_the_exported_values_of_what_is_merged() -> None:
    REFITTED.clear()
    exported, asked = {"scale": np.ones(4, np.float16)}, []

    def fill(names: Any) -> dict[str, np.ndarray]:
        asked.append(list(names))
        return {name: exported[name] for name in names if name in exported}

    kernel = np.zeros((4, 2), np.float32)
    refit(TRT, {"kernel", "scale"}, None, {"kernel": kernel}, "the engine", fill)
    assert asked == [["scale"]]
    (given,) = REFITTED
    assert given == {"kernel": ("float", kernel.ctypes.data, 8), "scale": ("half", exported["scale"].ctypes.data, 4)}
    with pytest.raises(EngineError, match=r"the engine: TensorRT wants 1 more weights to refit \(first: 'unnamed'\)"):
        refit(TRT, {"kernel", "unnamed"}, None, {"kernel": kernel}, "the engine", fill)
    with pytest.raises(EngineError, match=r"was not built to change 1 of 1 weights \(first: other\).*--refit all"):
        refit(TRT, {"kernel"}, None, {"other": kernel}, "the engine", fill)
    with pytest.raises(EngineError, match=r"preparing a change of weights \(pybind11.*nullptr\) failed"):
        refit(TRT, set(), None, {"kernel": kernel}, "the engine", fill)
    with pytest.raises(EngineError, match=r"weight 'kernel' is int64, and only float32, float16, bfloat16 can be"):
        refit(TRT, {"kernel"}, None, {"kernel": np.zeros(3, np.int64)}, "the engine", fill)
    assert len(REFITTED) == 1


def test_a_refit_that_failed_in_its_last_step_has_an_error_of_its_own() -> None:
    half = type("Half", (Refitter,), {"refit_cuda_engine": lambda self: False})
    kernel = {"kernel": np.zeros(2, np.float32)}
    with pytest.raises(HalfRefitError, match=r"the engine: TensorRT could not refit the engine"):
        refit(SimpleNamespace(**{**vars(TRT), "Refitter": half}), {"kernel"}, None, kernel, "the engine", lambda _: {})


# Settings


def test_rtx_captures_by_itself_kernels_that_are_compiled() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    assert captures_by_itself(trt)
    strategies = trt.DynamicShapesKernelSpecializationStrategy
    config = SimpleNamespace(
        cuda_graph_strategy=trt.CudaGraphStrategy.DISABLED,
        dynamic_shapes_kernel_specialization_strategy=strategies.LAZY,
    )
    configure_graphs(config, failed)
    assert config.cuda_graph_strategy == trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    assert config.dynamic_shapes_kernel_specialization_strategy == strategies.EAGER
    for name in vars(config):
        assert isinstance(getattr(trt.IRuntimeConfig, name), property)
    configure_graphs(SimpleNamespace(), failed)  # TensorRT has neither


def test_libraries_without_runtime_settings_capture_nothing() -> None:
    assert not captures_by_itself(TRT)


def test_the_runtime_cache_is_saved_once_for_a_shape(tmp_path: Path) -> None:
    blobs = [b"x" * size for size in (4, 8, 12)]
    cache = RuntimeCache("1" * 64)
    cache.path = tmp_path / "kernels.cache"
    made = SimpleNamespace(serialize=lambda: blobs.pop(0), deserialize=lambda _: True)
    config = SimpleNamespace(create_runtime_cache=lambda: made, set_runtime_cache=lambda _: True)
    cache.save_for("nothing was compiled yet")
    assert cache.attach(config)
    for shape in ((2, 16), (2, 32), (2, 16), (2, 32)):
        cache.save_for(shape)
    assert len(blobs) == 1
    assert cache.path.read_bytes() == b"x" * 8
    cache.save()
    assert cache.path.read_bytes() == b"x" * 12


def test_numbers_are_scalars_beside_the_latents() -> None:
    sample = torch.zeros(2, 4, 3, 3, dtype=torch.float16)
    for found in (_one_timestep(7, sample), _scalar(7, sample)):
        assert (found.dtype, found.shape, found.device, float(found)) == (torch.float32, (), sample.device, 7.0)


def test_no_garbage_is_collected_during_a_capture() -> None:
    with paused_gc():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with paused_gc():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.parametrize("native", [False, True])
def test_gpu_nobody_waits_for_the_device_while_a_library_may_capture(native: bool) -> None:
    held = []
    graph = ShapeGraph(Buffers({}, {}), lambda _: held.append(CAPTURING.locked()), None, native)
    graph.run({}, {}, torch.cuda.Stream())
    graph.close()
    assert held == [native]
