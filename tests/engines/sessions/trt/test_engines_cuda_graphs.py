"""CUDA graphs: which calls run through one, what their buffers hold, and on a GPU that no output is ever stale."""

from __future__ import annotations

import ast
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from engine_bundles import reference, unet_feeds
from gpu_engines import KINDS, graph_for_gpu, on_gpu, real_feeds, real_unet
from onnx import numpy_helper

from engines.sessions.base import EngineSession
from engines.sessions.opening import open_session
from engines.sessions.trt.context import failure
from engines.sessions.trt.cuda_graphs import (
    CAPACITY,
    REMEMBERED,
    STREAMS,
    Buffers,
    GraphCache,
    Key,
    graph_key,
    own_stream,
)
from engines.sessions.trt.runtime_cache import RuntimeCache
from sdkd.bundle.manifest import Bundle
from sdkd.targets.registry import cache_folder
from sdkd.workflow import rebuild


def key(size: int, profile: int = 0) -> Key:
    return graph_key(profile, {"sample": (2, 4, size, size), "timestep": ()})


ALL = [str(size) for size in range(1, CAPACITY + 1)]


def filled() -> tuple[GraphCache[str], list[str]]:
    """A cache that holds graphs for all sizes that it can, and the list of what it dropped."""
    dropped: list[str] = []
    cache: GraphCache[str] = GraphCache(dropped.append)
    for size in range(1, CAPACITY + 1):
        assert not cache.due(key(size))
        assert cache.due(key(size))
        cache.put(key(size), str(size))
    return cache, dropped


def test_a_key_is_a_profile_and_all_shapes() -> None:
    assert graph_key(0, {"a": (1, 2), "b": ()}) == graph_key(0, {"b": (), "a": (1, 2)})
    different = [key(16), key(32), key(16, 1), graph_key(0, {"sample": (1, 4, 16, 16), "timestep": ()})]
    assert len(set(different)) == len(different)


def test_the_second_call_of_a_shape_makes_its_graph() -> None:
    cache: GraphCache[str] = GraphCache(lambda _: None)
    calls = []
    for size in (16, 32, 16, 16, 32):
        if cache.find(key(size)):
            calls.append("replay")
        elif cache.due(key(size)):
            cache.put(key(size), str(size))
            calls.append("capture")
        else:
            calls.append("run")
    assert calls == ["run", "run", "capture", "replay", "capture"]


def test_another_profile_has_another_graph() -> None:
    cache, _ = filled()
    assert cache.find(key(1)) == "1"
    assert cache.find(key(1, profile=1)) is None
    assert not cache.due(key(1, profile=1))


def test_the_graph_that_was_not_used_for_longest_is_dropped() -> None:
    cache, dropped = filled()
    assert cache.find(key(1)) == "1"
    cache.put(key(40), "40")
    assert dropped == ["2"]
    assert len(cache) == CAPACITY
    cache.put(key(50), "50")
    assert dropped == ["2", "3"]
    assert cache.find(key(1)) == "1"
    assert cache.find(key(2)) is None
    assert not cache.due(key(2))  # runs plainly once more before it is captured again


def test_shapes_that_come_once_drop_no_graph() -> None:
    cache, dropped = filled()
    assert not any(cache.due(key(size)) for size in range(100, 100 + 3 * REMEMBERED))
    assert dropped == []
    assert cache.find(key(1)) == "1"
    assert not cache.due(key(100))  # forgotten: their number is bounded, too
    assert CAPACITY < REMEMBERED


def test_other_weights_drop_all_and_capture_again() -> None:
    cache, dropped = filled()
    cache.clear()
    assert dropped == ALL
    assert len(cache) == 0
    assert cache.find(key(1)) is None
    assert [cache.due(key(1)) for _ in range(2)] == [False, True]


def test_graphs_are_switched_off_with_one_reason(caplog: pytest.LogCaptureFixture) -> None:
    cache, dropped = filled()
    with caplog.at_level(logging.INFO, "engines.sessions.trt.cuda_graphs"):
        cache.disable("the unet", "an operation cannot be captured")
        cache.disable("the unet", "another reason")
    assert caplog.messages == ["the unet runs without CUDA graphs: an operation cannot be captured"]
    assert cache.off == "an operation cannot be captured"
    assert dropped == ALL
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


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"sample": torch.full((2, 4, 3, 3), value), "timestep": torch.tensor(value)}


def test_buffers_keep_their_addresses_and_share_nothing() -> None:
    feeds, outputs = tensors(1.0), {"out": torch.zeros(2, 4, 3, 3)}
    buffers = Buffers(feeds, outputs)
    every = [*buffers.inputs.values(), *buffers.outputs.values()]
    before = [tensor.data_ptr() for tensor in every]
    assert len({tensor.data_ptr() for tensor in (*every, *feeds.values(), *outputs.values())}) == 6
    results = []
    for value in (1.0, 2.0, 1.0):
        buffers.fill(tensors(value))
        torch.mul(buffers.inputs["sample"], buffers.inputs["timestep"] + 1, out=buffers.outputs["out"])
        results.append({"out": torch.full((2, 4, 3, 3), -1.0)})
        buffers.give(results[-1])
    assert [float(result["out"].unique()) for result in results] == [2.0, 6.0, 2.0]
    assert [tensor.data_ptr() for tensor in every] == before


def test_buffers_are_contiguous_whatever_the_call_had() -> None:
    odd = torch.randn(3, 8, 2).transpose(0, 2)
    buffers = Buffers({"sample": odd}, {})
    buffers.fill({"sample": odd})
    assert buffers.inputs["sample"].is_contiguous()
    assert torch.equal(buffers.inputs["sample"], odd)


def test_buffers_of_inference_mode_serve_other_calls() -> None:
    with torch.inference_mode():
        buffers = Buffers(tensors(1.0), {"out": torch.zeros(3)})
        buffers.fill(tensors(1.0))
    with torch.no_grad():
        buffers.fill(tensors(2.0))
        buffers.give({"out": torch.zeros(3)})
    assert float(buffers.inputs["timestep"]) == 2.0


def test_a_failed_step_is_told_with_the_last_messages() -> None:
    assert str(failure("the engine", "tensorrt", [], "binding")) == "the engine: binding failed"
    assert str(failure("the engine", "tensorrt", ["one", "two"], "binding")).endswith("failed by tensorrt (one; two)")


def test_libraries_that_compile_nothing_keep_no_runtime_cache() -> None:
    cache = RuntimeCache("0" * 64)
    assert cache.attach(object())
    cache.save()
    assert cache.path == cache_folder() / "runtime" / f"{'0' * 64}.cache"
    assert not cache.path.exists()


def test_rtx_has_a_strategy_of_its_own() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    assert isinstance(trt.IRuntimeConfig.cuda_graph_strategy, property)
    assert {"DISABLED", "WHOLE_GRAPH_CAPTURE"} <= set(trt.CudaGraphStrategy.__members__)


# On a GPU


def graphs(session: EngineSession) -> int:
    """How many graphs a session holds; TensorRT's own must have been captured."""
    cache = session._graphs  # type: ignore[attr-defined]
    assert cache.off == ""
    if session.slot == "tensorrt":
        assert all(entry._graph is not None for entry in cache._entries.values())
    return len(cache)


def varied(feeds: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Inputs of the same shapes with other values."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator).to(tensor.dtype) if tensor.dim() else tensor
        for name, tensor in feeds.items()
    }


def same(one: torch.Tensor, other: torch.Tensor, kind: str) -> bool:
    """Bit for bit on TensorRT; TensorRT-RTX may change to faster kernels between two calls."""
    return torch.equal(one, other) if kind == "tensorrt" else torch.allclose(one, other, atol=2e-2)


@pytest.fixture(scope="module", params=KINDS)
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A hand-written UNet in float16 for this GPU: 32 to 64 px, up to 2 images."""
    return graph_for_gpu(tmp_path_factory.mktemp("graphs") / "bundle", request.param)


def run(session: EngineSession, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
    return session.run(on_gpu(feeds))["out_sample"]


@pytest.mark.gpu
def test_gpu_no_output_is_stale(small: Bundle) -> None:
    kind = small.slots()[0]
    cases = [varied(unet_feeds("fp16"), seed) for seed in range(3)]
    order = [0, 1, 0, 2, 2, 1, 0, 1, 2, 0] * 3
    with open_session(small, kind, "unet", cuda_graphs=False) as plain:
        expected = [run(plain, feeds).clone() for feeds in cases]
    assert not same(expected[0], expected[1], kind)
    with open_session(small, kind, "unet") as session:
        kept = [run(session, cases[case]) for case in order]  # no wait in between
        assert graphs(session) == 1
        copies = [result.clone() for result in kept]
        for seed in range(20, 30):
            run(session, varied(cases[0], seed))
        for case, result, copy in zip(order, kept, copies, strict=True):
            assert same(result, expected[case], kind)
            assert torch.equal(result, copy)
        assert len({result.data_ptr() for result in kept}) == len(kept)
        (entry,) = session._graphs._entries.values()  # type: ignore[attr-defined]
        static = {t.data_ptr() for t in (*entry.buffers.inputs.values(), *entry.buffers.outputs.values())}
        assert len(static) == 4
        assert static.isdisjoint(result.data_ptr() for result in kept)


@pytest.mark.gpu
def test_gpu_more_shapes_than_graphs(small: Bundle) -> None:
    kind = small.slots()[0]
    shapes = [(batch, size) for batch in (1, 2, 3, 4) for size in (16, 24, 32)]
    assert len(shapes) > CAPACITY
    with open_session(small, kind, "unet", cuda_graphs=False) as plain, open_session(small, kind, "unet") as session:
        for turn in range(3):
            for batch, size in shapes:
                for repeat in range(3):  # plainly, with capture, by replay
                    feeds = varied(unet_feeds("fp16", batch, size), 100 * turn + repeat)
                    assert same(run(session, feeds), run(plain, feeds), kind), (turn, batch, size, repeat)
            assert graphs(session) == CAPACITY
        for turn in range(6):  # shapes in turn: graphs stay right while plain runs and others change shapes
            for batch, size in shapes[-3:]:
                feeds = varied(unet_feeds("fp16", batch, size), turn)
                assert same(run(session, feeds), run(plain, feeds), kind), (turn, batch, size)
            one_off = varied(unet_feeds("fp16", *shapes[turn]), turn)
            assert same(run(session, one_off), run(plain, one_off), kind)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("refit", ["none", "all"])
def test_gpu_a_replay_after_a_swap_has_the_new_weights(tmp_path: Path, kind: str, refit: str) -> None:
    options: dict[str, Any] = {} if refit == "none" else {"refit": refit}
    bundle = real_unet(tmp_path / "bundle", kind, **options)
    feeds, expected = real_feeds(bundle), reference(bundle, "unet", real_feeds(bundle))
    graph = onnx.load(bundle.path / bundle.component("unet").files[0].path).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    kernel, bias = (numpy_helper.to_array(stored[name]) for name in ("conv_out.weight", "conv_out.bias"))
    constant = torch.tensor(bias)[None, :, None, None].expand_as(expected)
    with open_session(bundle, kind, "unet") as session:
        session.rebuild = rebuild
        zeros = {"conv_out.weight": torch.from_numpy(np.zeros_like(kernel))}
        for weights, wanted in ((None, expected), (zeros, constant), ({}, expected)):
            if weights is not None:
                session.swap(weights)
                assert len(session._graphs) == 0  # type: ignore[attr-defined]
            for _ in range(4):
                assert torch.allclose(run(session, feeds).cpu(), wanted, atol=1e-3)
            assert graphs(session) == 1


@pytest.mark.gpu
def test_gpu_replays_wait_for_the_callers_stream(small: Bundle) -> None:
    kind = small.slots()[0]
    feeds = unet_feeds("fp16")
    with open_session(small, kind, "unet", cuda_graphs=False) as plain:
        expected = run(plain, feeds).clone()
    big = torch.randn(4096, 4096, device="cuda")
    streams = [torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.default_stream()]
    torch.cuda.synchronize()
    with open_session(small, kind, "unet") as session:
        for index in range(12):
            with torch.cuda.stream(streams[index % 3]):
                late = on_gpu(feeds)
                sample, late["sample"] = late["sample"], torch.full_like(late["sample"], float("nan"))
                for _ in range(10):
                    big = (big @ big).clamp(-1, 1)  # keeps the stream busy while the input is made
                late["sample"].copy_(sample)
                result = session.run(late)["out_sample"] * 2
                late["sample"].fill_(float("nan"))  # queued after the run: must not be seen by it
                del late
                torch.empty(1 << 20, device="cuda").fill_(float("nan"))
                torch.cuda.current_stream().synchronize()
            assert same(result / 2, expected, kind), index
        assert graphs(session) == 1


@pytest.mark.gpu
def test_gpu_with_and_without_graphs_are_equal(small: Bundle) -> None:
    kind = small.slots()[0]
    with open_session(small, kind, "unet", cuda_graphs=False) as plain, open_session(small, kind, "unet") as session:
        for seed in range(8):
            feeds = varied(unet_feeds("fp16"), seed)
            with torch.inference_mode(seed % 2 == 1):
                assert same(run(session, feeds), run(plain, feeds), kind)
        assert graphs(session) == 1
        assert len(plain._graphs) == 0  # type: ignore[attr-defined]


@pytest.mark.gpu
def test_gpu_a_failed_capture_costs_no_call(small: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    kind = small.slots()[0]
    if kind != "tensorrt":
        pytest.skip("TensorRT-RTX captures by itself")
    with open_session(small, kind, "unet", cuda_graphs=False) as plain, open_session(small, kind, "unet") as session:
        feeds = [varied(unet_feeds("fp16"), seed) for seed in range(6)]
        expected = [run(plain, one).clone() for one in feeds]
        results = [run(session, feeds[0])]
        other, side = torch.cuda.CUDAGraph(), session._side  # type: ignore[attr-defined]
        make = session._make_graph  # type: ignore[attr-defined]

        def breaking(call: Any) -> Any:
            graph = make(call)
            enqueue = graph._enqueue

            def synchronizing(stream: int) -> None:
                enqueue(stream)
                if torch.cuda.is_current_stream_capturing():
                    side.synchronize()  # what no capture survives

            graph._enqueue = synchronizing
            return graph

        session._make_graph = breaking  # type: ignore[attr-defined]
        results += [run(session, one) for one in feeds[1:]]
        assert all(same(one, two, kind) for one, two in zip(results, expected, strict=True))
        assert [message for message in caplog.messages if "runs without CUDA graphs" in message]
        assert len(session._graphs) == 0  # type: ignore[attr-defined]
        assert torch.randn(3, device="cuda").isfinite().all()  # a failed capture may leave torch refusing them
        with torch.cuda.stream(side):  # out of capture, and usable
            other.capture_begin()
            value = torch.ones(3, device="cuda") * 2
            other.capture_end()
            other.replay()
        torch.cuda.synchronize()
        assert value.tolist() == [2.0, 2.0, 2.0]


def test_the_gpu_tests_are_marked() -> None:
    tree = ast.parse(Path(__file__).read_text())
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_gpu_")]
    assert len(tests) == 6
    assert all("gpu" in ast.unparse(node.decorator_list[0]) for node in tests)
