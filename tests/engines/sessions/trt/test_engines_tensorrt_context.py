"""TensorRT's contexts, refits, CUDA graphs without a GPU: small objects stand for the library's, which need one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engines.sessions.cuda_graphs import (
    CAPACITY,
    REMEMBERED,
    STREAMS,
    Buffers,
    GraphCache,
    Key,
    ShapeGraph,
    graph_key,
    own_stream,
)
from engines.sessions.out_of_memory import CAPTURING
from engines.sessions.trt.context import BoundContext, Call, failure
from engines.sessions.trt.opening import HalfRefitError, RuntimeCache, captures_by_itself, configure_graphs, refit
from sdkd.errors import EngineError
from sdkd.targets.gpu_trial import reasons
from sdkd.targets.registry import cache_folder
from sdkd.targets.tensorrt_api import recorder

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
    own = BoundContext(context, False, failed)  # has memory of its own, and is given none
    own.prepare(call(2), STREAM)
    own.set_workspace(None)
    assert (own.needed, len(context.workspaces)) == (0, 4)


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
    half = SimpleNamespace(**{**vars(TRT), "Refitter": type("", (Refitter,), {"refit_cuda_engine": lambda _: False})})
    with pytest.raises(HalfRefitError, match=r"the engine: TensorRT could not refit the engine"):
        refit(half, {"kernel"}, None, {"kernel": kernel}, "the engine", fill)


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
    assert not captures_by_itself(TRT)


def test_the_runtime_cache_is_saved_once_for_a_shape(tmp_path: Path) -> None:
    blobs = [b"x" * size for size in (4, 8, 12)]
    cache = RuntimeCache("1" * 64)
    assert cache.path == cache_folder() / "runtime" / f"{'1' * 64}.cache"
    cache.path = tmp_path / "kernels.cache"
    made = SimpleNamespace(serialize=lambda: blobs.pop(0), deserialize=lambda _: True)
    config = SimpleNamespace(create_runtime_cache=lambda: made, set_runtime_cache=lambda _: True)
    assert cache.attach(object())  # of a library that compiles nothing
    cache.save_for("nothing was compiled yet")
    assert not cache.path.exists()
    assert cache.attach(config)
    for shape in ((2, 16), (2, 32), (2, 16), (2, 32)):
        cache.save_for(shape)
    assert len(blobs) == 1
    assert cache.path.read_bytes() == b"x" * 8
    cache.save()
    assert cache.path.read_bytes() == b"x" * 12


def test_a_failed_step_is_told_with_the_last_messages() -> None:
    assert str(failure("the engine", "tensorrt", [], "binding")) == "the engine: binding failed"
    assert str(failure("the engine", "tensorrt", ["one", "two"], "binding")).endswith("failed by tensorrt (one; two)")


def test_invalid_engines_are_explained() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    log = recorder("tensorrt-rtx")
    log.messages.clear()
    assert trt.Runtime(log).deserialize_cuda_engine(b"not an engine at all" * 50) is None
    assert any("Serialization" in message for message in log.messages)
    assert recorder("tensorrt-rtx") is log
    validity, diagnostics = trt.Runtime(log).get_engine_validity(b"x" * 1000)
    assert validity == trt.EngineValidity.INVALID
    assert [reasons(trt, found) for found in (diagnostics, 3, 0)] == [
        ["malformed engine"], ["version mismatch", "unsupported cc"], ["invalid"],
    ]  # fmt: skip


# CUDA graphs


def key(size: int, profile: int = 0) -> Key:
    return graph_key(profile, {"sample": (2, 4, size, size), "timestep": ()})


def filled(dropped: list[str]) -> GraphCache[str]:
    """A cache that holds graphs for all sizes that it can, each made by the second call of its shape."""
    cache: GraphCache[str] = GraphCache(dropped.append)
    for size in range(1, CAPACITY + 1):
        assert cache.find(key(size)) is None
        assert [cache.due(key(size)) for _ in range(2)] == [False, True]
        cache.put(key(size), str(size))
    return cache


def test_a_key_is_a_profile_and_all_shapes() -> None:
    assert graph_key(0, {"a": (1, 2), "b": ()}) == graph_key(0, {"b": (), "a": (1, 2)})
    different = [key(16), key(32), key(16, 1), graph_key(0, {"sample": (1, 4, 16, 16), "timestep": ()})]
    assert len(set(different)) == len(different)


def test_the_graph_that_was_not_used_for_longest_is_dropped() -> None:
    cache = filled(dropped := [])
    assert cache.find(key(1)) == "1"
    assert cache.find(key(1, profile=1)) is None
    assert not any(cache.due(key(size)) for size in range(100, 100 + 3 * REMEMBERED))  # shapes that come once
    assert dropped == []
    assert not cache.due(key(100))  # forgotten: their number is bounded, too
    cache.put(key(40), "40")
    assert dropped == ["2"]
    assert len(cache) == CAPACITY < REMEMBERED
    assert (cache.find(key(1)), cache.find(key(2))) == ("1", None)
    assert not cache.due(key(2))  # runs plainly once more before it is captured again


def test_other_weights_and_failures_drop_all(caplog: pytest.LogCaptureFixture) -> None:
    everything = [str(size) for size in range(1, CAPACITY + 1)]
    cache = filled(dropped := [])
    cache.clear()
    assert (dropped, len(cache)) == (everything, 0)
    assert [cache.due(key(1)) for _ in range(2)] == [False, True]
    cache = filled(dropped := [])
    cache.disable("the unet", "an operation cannot be captured")
    cache.disable("the unet", "another reason")
    assert caplog.messages == ["the unet runs without CUDA graphs: an operation cannot be captured"]
    assert (cache.off, dropped) == ("an operation cannot be captured", everything)
    assert not any(cache.due(key(7)) for _ in range(3))


def test_no_two_sessions_capture_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch hands out streams of a pool in turn, whoever has them."""

    class Stream:
        made = 0

        def __init__(self, device: torch.device, priority: int) -> None:
            assert priority == -1
            self.cuda_stream = Stream.made % STREAMS
            Stream.made += 1

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    kept = [own_stream(first)]
    for _ in range(STREAMS - 1):  # others take and give back all between
        own_stream(first)
    kept += [own_stream(first) for _ in range(STREAMS - 1)]
    assert {stream.cuda_stream for stream in kept if stream} == set(range(STREAMS))
    assert own_stream(first) is None
    assert own_stream(second) is not None
    kept.pop(7)
    assert own_stream(first) is not None


def test_buffers_keep_their_addresses_and_share_nothing() -> None:
    odd = torch.randn(3, 8, 2).transpose(0, 2)
    feeds, outputs = {"sample": odd, "timestep": torch.tensor(1.0)}, {"out": torch.zeros(odd.shape)}
    with torch.inference_mode():
        buffers = Buffers(feeds, outputs)
    every = [*buffers.inputs.values(), *buffers.outputs.values()]
    before = [tensor.data_ptr() for tensor in every]
    assert len({tensor.data_ptr() for tensor in (*every, *feeds.values(), *outputs.values())}) == 6
    assert buffers.inputs["sample"].is_contiguous()
    results = []
    for value in (1.0, 2.0, 1.0):
        with torch.inference_mode(value == 2.0):
            buffers.fill({"sample": value * odd, "timestep": torch.tensor(value)})
            torch.mul(buffers.inputs["sample"], buffers.inputs["timestep"], out=buffers.outputs["out"])
            results.append({"out": torch.zeros(odd.shape)})
            buffers.give(results[-1])
    assert all(torch.equal(result["out"], factor * odd) for result, factor in zip(results, (1, 4, 1), strict=True))
    assert [tensor.data_ptr() for tensor in every] == before


@pytest.mark.parametrize("native", [False, True])
def test_gpu_nobody_waits_for_the_device_while_a_library_may_capture(native: bool) -> None:
    held = []
    graph = ShapeGraph(Buffers({}, {}), lambda _: held.append(CAPTURING.locked()), None, native)
    graph.run({}, {}, torch.cuda.Stream())
    graph.close()
    assert held == [native]
