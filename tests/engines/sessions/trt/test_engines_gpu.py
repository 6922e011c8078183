"""Sessions on a GPU: values, streams, CUDA graphs whose outputs are never stale, profiles, other weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from engine_bundles import reference, unet_feeds
from gpu_engines import (
    KINDS,
    LARGE,
    SMALL,
    WITH_GRAPHS,
    graph_for_gpu,
    on_gpu,
    real_feeds,
    real_unet,
    same,
    skip_foreign,
    usable,
)  # fmt: skip
from graph_bundles import graph_bundle
from onnx import numpy_helper

from engines.pipelines.layers import count_layers
from engines.sessions.base import EngineSession
from engines.sessions.cuda_graphs import CAPACITY
from engines.sessions.opening import open_session
from engines.sessions.trt.session import ALIGNMENT, recorder
from export.build.engines import build_engine
from export.build.options import REFIT
from sdkd.bundle.manifest import Bundle
from sdkd.bundle.onnx_weights import torch_weights
from sdkd.commands.inspect import examine
from sdkd.errors import EngineError, RangeError
from sdkd.targets.registry import cache_folder, require
from sdkd.workflow import rebuild


@pytest.fixture(scope="module", params=WITH_GRAPHS)
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A hand-written UNet in float16 for this GPU: 32 to 64 px, up to 2 images."""
    return graph_for_gpu(tmp_path_factory.mktemp("gpu") / "bundle", request.param)


@pytest.fixture
def kind(small: Bundle) -> str:
    return small.slots()[0]


def run(session: EngineSession, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
    return session.run(on_gpu(feeds))["out_sample"]


def close(result: torch.Tensor, bundle: Bundle, feeds: dict[str, torch.Tensor], most: float = 2e-2) -> bool:
    return torch.allclose(result.float().cpu(), reference(bundle, "unet", feeds).float(), atol=most)


def graphs(session: EngineSession) -> int:
    """How many graphs a session holds; TensorRT's own must have been captured."""
    cache = session._graphs  # type: ignore[attr-defined]
    assert cache.off == ""
    if session.slot != "tensorrt-rtx":
        assert all(entry._graph is not None for entry in cache._entries.values())
    return len(cache)


def varied(feeds: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Inputs of the same shapes with other values."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator).to(tensor.dtype) if tensor.dim() else tensor
        for name, tensor in feeds.items()
    }


def late_inputs(feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs on the GPU, whose latents are made only after long work on the current stream."""
    late = on_gpu(feeds)
    sample, late["sample"] = late["sample"], torch.full_like(late["sample"], float("nan"))
    big = torch.randn(4096, 4096, device="cuda")
    for _ in range(10):
        big = (big @ big).clamp(-1, 1)
    late["sample"].copy_(sample)
    return late


def test_gpu_values_across_shapes_and_streams(small: Bundle, kind: str) -> None:
    with open_session(small, kind, "unet") as session:
        for batch, size in ((1, 16), (4, 32), (2, 16), (1, 32), (1, 16)):
            feeds = unet_feeds("fp16", batch, size)
            assert close(run(session, feeds), small, feeds)
            with torch.cuda.stream(torch.cuda.Stream()):
                result = run(session, feeds)
                torch.cuda.current_stream().synchronize()
            assert close(result, small, feeds)
        assert session.run(unet_feeds("fp16"))["out_sample"].device.type == "cpu"
        feeds = unet_feeds("fp16", 3)
        queue = torch.zeros(1 + feeds["sample"].numel(), dtype=torch.float16, device="cuda")
        odd = queue[1:].view(feeds["sample"].shape)
        odd.copy_(feeds["sample"])
        assert odd.data_ptr() % ALIGNMENT
        assert close(session.run(on_gpu(feeds) | {"sample": odd})["out_sample"], small, feeds)


def test_gpu_no_output_is_stale(small: Bundle, kind: str) -> None:
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


def test_gpu_more_shapes_than_graphs(small: Bundle, kind: str) -> None:
    shapes = [(batch, size) for batch in (1, 2, 3, 4) for size in (16, 24, 32)]
    assert len(shapes) > CAPACITY
    with open_session(small, kind, "unet", cuda_graphs=False) as plain, open_session(small, kind, "unet") as session:
        for turn in range(3):
            for batch, size in shapes:
                for repeat in range(3):  # plainly, with capture, by replay
                    feeds = varied(unet_feeds("fp16", batch, size), 100 * turn + repeat)
                    with torch.inference_mode(repeat % 2 == 1):
                        assert same(run(session, feeds), run(plain, feeds), kind), (turn, batch, size, repeat)
            assert graphs(session) == CAPACITY
        for turn in range(6):  # shapes in turn: graphs stay right while plain runs and others change shapes
            for batch, size in (*shapes[-3:], shapes[turn]):
                feeds = varied(unet_feeds("fp16", batch, size), turn)
                assert same(run(session, feeds), run(plain, feeds), kind), (turn, batch, size)
        assert len(plain._graphs) == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("cuda_graphs", [None, False])
def test_gpu_runs_wait_for_the_callers_stream(small: Bundle, kind: str, cuda_graphs: bool | None) -> None:
    feeds = unet_feeds("fp16")
    streams = [torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.default_stream()]
    with open_session(small, kind, "unet", cuda_graphs=cuda_graphs) as session:
        for index in range(12):
            with torch.cuda.stream(streams[index % 3]):
                late = late_inputs(feeds)
                result = session.run(late)["out_sample"] * 2
                late["sample"].fill_(float("nan"))  # queued after the run: must not be seen by it
                del late
                torch.empty(1 << 20, device="cuda").fill_(float("nan"))  # would overwrite what was freed too early
                torch.cuda.current_stream().synchronize()
            assert close(result / 2, small, feeds), index
        assert cuda_graphs is False or graphs(session) == 1


def test_gpu_a_failed_capture_costs_no_call(small: Bundle, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    if kind == "tensorrt-rtx":
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


def test_gpu_runtime_cache_is_kept(small: Bundle, kind: str) -> None:
    feeds = unet_feeds("fp16")
    session = open_session(small, kind, "unet")
    run(session, feeds)
    session.close()
    if kind == "tensorrt-rtx":
        digest = session.checked.record.files[0].sha256
        assert (cache_folder() / "runtime" / f"{digest}.cache").stat().st_size > 0
    with pytest.raises(EngineError, match=r"is closed"):
        run(session, feeds)
    with open_session(small, kind, "unet") as again:
        assert close(run(again, feeds), small, feeds)


def test_gpu_layers_say_their_precision(small: Bundle, kind: str) -> None:
    layers = count_layers(small, kind, "unet")
    assert "fp16" in {precision for _, precision, _ in layers}
    (row,) = examine(small, layers=True)["engines"]
    assert row["problems"] == []
    assert row["layers"] == [{"type": kind, "precision": p, "count": n} for kind, p, n in layers]


@pytest.mark.parametrize("target", KINDS)
def test_gpu_profiles_are_switched(tmp_path: Path, target: str) -> None:
    usable(target)
    bundle = graph_bundle(tmp_path / "bundle", "fp16", ("unet", "vae_decoder", "text_encoder"))
    bundle = build_engine(bundle, target, ranges=(SMALL, LARGE), components=("unet",))
    skip_foreign(bundle, target)
    # Batch with guidance and latents, and the profile that fits and is smallest.
    cases = [(4, 16, 0), (2, 32, 1), (2, 16, 0), (1, 24, 1), (4, 16, 0), (2, 32, 1)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    with open_session(bundle, target, "unet", cuda_graphs=False) as plain:
        for index, (batch, size, profile) in enumerate(cases):
            feeds = unet_feeds("fp16", batch, size)
            with torch.cuda.stream(streams[index % 2]):  # no wait in between: a switch must wait for the last run
                result = run(plain, feeds)
            assert plain._main.context.active_optimization_profile == profile  # type: ignore[attr-defined]
            torch.cuda.synchronize()
            assert close(result, bundle, feeds)
        with pytest.raises(RangeError, match=r"asked for batch 2 \(4 with guidance\), height 64 px.*covers all"):
            run(plain, unet_feeds("fp16", 4, 32))
    with open_session(bundle, target, "unet") as session:
        for turn in range(4):
            for batch, size, _ in cases:
                feeds = unet_feeds("fp16", batch, size) | {"timestep": torch.tensor(float(turn + 1))}
                assert close(run(session, feeds), bundle, feeds)
        assert graphs(session) == len(set(cases))


# Weights


def zeroed(bundle: Bundle) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The last convolution's weights as zeros, and what the UNet gives with them: its bias everywhere."""
    graph = onnx.load(bundle.path / bundle.component("unet").files[0].path).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    zeros = {"conv_out.weight": torch.from_numpy(np.zeros_like(stored["conv_out.weight"]))}
    shape = reference(bundle, "unet", real_feeds(bundle)).shape
    return zeros, torch.tensor(stored["conv_out.bias"])[None, :, None, None].expand(shape)


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("refit", REFIT)
def test_gpu_only_marked_weights_can_change(tmp_path: Path, target: str, refit: str) -> None:
    bundle = real_unet(tmp_path / "bundle", target, **({} if refit == "none" else {"refit": refit}))
    trt, feeds = require(target), real_feeds(bundle)
    zeros, constant = zeroed(bundle)
    with open_session(bundle, target, "unet") as session:
        assert close(run(session, feeds), bundle, feeds, 1e-3)
        engine = session._engine  # type: ignore[attr-defined]
        assert engine.refittable == (refit != "none")
        if refit == "none":
            return
        refitter = trt.Refitter(engine, recorder(target))
        names = set(refitter.get_all_weights())
        assert "conv_out.weight" in names
        assert ("time_embedding.linear_1.weight" in names) == (refit == "all")
        assert refitter.set_named_weights("conv_out.weight", trt.Weights(zeros["conv_out.weight"].numpy()))
        assert refitter.refit_cuda_engine()
        assert torch.allclose(run(session, feeds).cpu(), constant, atol=1e-5)


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("refit", ["none", "all"])
def test_gpu_a_replay_after_a_swap_has_the_new_weights(tmp_path: Path, target: str, refit: str) -> None:
    bundle = real_unet(tmp_path / "bundle", target, **({} if refit == "none" else {"refit": refit}))
    feeds = real_feeds(bundle)
    expected, (zeros, constant) = reference(bundle, "unet", feeds), zeroed(bundle)
    with open_session(bundle, target, "unet") as session:
        session.rebuild = rebuild
        for weights, wanted in ((None, expected), (zeros, constant), ({}, expected)):
            if weights is not None:
                session.swap(weights)
                assert len(session._graphs) == 0  # type: ignore[attr-defined]
            for _ in range(4):
                assert torch.allclose(run(session, feeds).cpu(), wanted, atol=1e-3)
            assert graphs(session) == 1


def test_gpu_weights_are_written_where_captured_graphs_read_them(tmp_path: Path) -> None:
    bundle, feeds = graph_for_gpu(tmp_path / "bundle", "inductor"), unet_feeds("fp16")
    weight = torch_weights(bundle.path / "unet" / "model.onnx", ["to_out"])["to_out"]
    context = (feeds["encoder_hidden_states"].float().mean(1) @ weight.float())[:, :, None, None]
    with open_session(bundle, "inductor", "unet") as session:
        before = [run(session, feeds) for _ in range(3)][-1].clone()
        session.swap({"conv": torch.zeros(4, 4, 3, 3)})
        assert torch.allclose(run(session, feeds).float().cpu(), context.expand(before.shape), atol=2e-2)
        assert graphs(session) == 1
        with torch.cuda.stream(torch.cuda.Stream()):
            session.swap({})
        assert torch.equal(run(session, feeds), before)
        assert graphs(session) == 1
