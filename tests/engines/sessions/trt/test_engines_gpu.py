"""TensorRT sessions: what the library says without a GPU, and the real thing on one."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from engine_bundles import graph_unet, pipeline_bundle, reference, unet_feeds
from gpu_engines import KINDS, LARGE, SMALL, graph_for_gpu, on_gpu, real_feeds, real_unet, skip_foreign, usable
from graph_bundles import graph_bundle
from onnx import numpy_helper
from small_bundles import small_pipeline

from engines.pipelines.layers import count_layers
from engines.pipelines.pipeline import load_pipeline, plug
from engines.sessions.base import EngineSession
from engines.sessions.opening import open_session
from engines.sessions.trt import session as session_tensorrt
from engines.sessions.trt.session import recorder
from export.build.engines import build_engine
from export.build.options import REFIT
from sdkd.bundle.manifest import Bundle
from sdkd.commands.inspect import examine
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.errors import EngineError, RangeError
from sdkd.targets.gpu_trial import reasons
from sdkd.targets.registry import cache_folder, require


def test_the_recorder_keeps_errors() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    log = session_tensorrt.recorder("tensorrt-rtx")
    log.messages.clear()
    assert trt.Runtime(log).deserialize_cuda_engine(b"not an engine at all" * 50) is None
    assert any("Serialization" in message for message in log.messages)
    assert session_tensorrt.recorder("tensorrt-rtx") is log


def test_invalid_engines_are_explained() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    validity, diagnostics = trt.Runtime(session_tensorrt.recorder("tensorrt-rtx")).get_engine_validity(b"x" * 1000)
    assert validity == trt.EngineValidity.INVALID
    assert reasons(trt, diagnostics) == ["malformed engine"]
    assert reasons(trt, 3) == ["version mismatch", "unsupported cc"]
    assert reasons(trt, 0) == ["invalid"]


# On a GPU


@pytest.fixture(scope="module", params=KINDS)
def gpu_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return graph_for_gpu(tmp_path_factory.mktemp("gpu") / "bundle", request.param)


@pytest.fixture
def session(gpu_bundle: Bundle) -> EngineSession:
    return open_session(gpu_bundle, gpu_bundle.slots()[0], "unet")


def close(result: torch.Tensor, bundle: Bundle, feeds: dict[str, torch.Tensor]) -> bool:
    return torch.allclose(result.float().cpu(), reference(bundle, "unet", feeds).float(), atol=2e-2)


@pytest.mark.gpu
def test_gpu_values_across_shapes_and_streams(session: EngineSession, gpu_bundle: Bundle) -> None:
    for batch, size in ((1, 16), (4, 32), (2, 16), (1, 32), (1, 16)):
        feeds = unet_feeds("fp16", batch, size)
        assert close(session.run(on_gpu(feeds))["out_sample"], gpu_bundle, feeds)
        with torch.cuda.stream(torch.cuda.Stream()):
            result = session.run(on_gpu(feeds))["out_sample"]
            torch.cuda.current_stream().synchronize()
        assert close(result, gpu_bundle, feeds)
    assert session.run(unet_feeds("fp16"))["out_sample"].device.type == "cpu"


@pytest.mark.gpu
def test_gpu_outputs_stay_what_they_were(session: EngineSession, gpu_bundle: Bundle) -> None:
    cases = [unet_feeds("fp16") | {"timestep": torch.tensor(float(step))} for step in range(1, 60)]
    results = [session.run(on_gpu(feeds))["out_sample"] for feeds in cases]  # queued without a wait in between
    assert len({result.data_ptr() for result in results}) == len(results)
    assert all(close(result, gpu_bundle, feeds) for result, feeds in zip(results, cases, strict=True))


@pytest.mark.gpu
def test_gpu_slices_are_aligned_first(session: EngineSession, gpu_bundle: Bundle) -> None:
    feeds = unet_feeds("fp16", 3)
    queue = torch.zeros(1 + feeds["sample"].numel(), dtype=torch.float16, device="cuda")
    odd = queue[1:].view(feeds["sample"].shape)
    odd.copy_(feeds["sample"])
    assert odd.data_ptr() % session_tensorrt.ALIGNMENT
    assert close(session.run(on_gpu(feeds) | {"sample": odd})["out_sample"], gpu_bundle, feeds)


@pytest.mark.gpu
def test_gpu_work_before_and_after_is_ordered(session: EngineSession, gpu_bundle: Bundle) -> None:
    feeds = unet_feeds("fp16")
    big = torch.randn(4096, 4096, device="cuda")
    for _ in range(5):
        late = on_gpu(feeds)
        for _ in range(10):
            big = (big @ big).clamp(-1, 1)  # keeps the stream busy while the inputs are made
        late["sample"] = late["sample"] + big[0, 0].half() * 0
        late["sample"] = torch.where(torch.isfinite(late["sample"]), late["sample"], 0)
        doubled = session.run(late)["out_sample"] * 2
        del late
        torch.empty(1 << 20, device="cuda").fill_(float("nan"))  # would overwrite what was freed too early
        assert close(doubled / 2, gpu_bundle, feeds)


@pytest.mark.gpu
def test_gpu_runtime_cache_is_kept(session: EngineSession, gpu_bundle: Bundle) -> None:
    session.run(on_gpu(unet_feeds("fp16")))
    session.close()
    if gpu_bundle.slots()[0] == "tensorrt-rtx":
        digest = session.checked.record.files[0].sha256
        assert (cache_folder() / "runtime" / f"{digest}.cache").stat().st_size > 0
    with pytest.raises(EngineError, match=r"is closed"):
        session.run(on_gpu(unet_feeds("fp16")))
    with open_session(gpu_bundle, gpu_bundle.slots()[0], "unet") as again:
        feeds = unet_feeds("fp16")
        assert close(again.run(on_gpu(feeds))["out_sample"], gpu_bundle, feeds)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_pipeline_equals_eager(tmp_path: Path, kind: str) -> None:
    usable(kind)
    bundle = pipeline_bundle(tmp_path / "bundle", targets=())
    ranges = ShapeRanges(Range(1, 1, 2), Range(32, 32, 64), Range(32, 32, 64), Range.fixed(77))
    skip_foreign(build_engine(bundle, kind, precision="fp32", ranges=ranges), kind)
    eager, engine = small_pipeline(), plug(small_pipeline(), bundle, kind)
    assert engine.device.type == "cuda"
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    images = [
        pipe("a red star", num_inference_steps=4, num_images_per_prompt=3, output_type="np", generator=generator).images
        for pipe, generator in zip((eager, engine), generators, strict=True)
    ]
    error = float(np.mean((images[0].astype(np.float64) - images[1]) ** 2))
    assert -10 * np.log10(error) > 40
    assert load_pipeline(bundle).unet.session.slot == kind


@pytest.mark.gpu
def test_gpu_onnxruntime_binds_cuda_memory(tmp_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    bundle = graph_unet(tmp_path / "bundle", "fp16", ("onnxruntime",))
    feeds = unet_feeds("fp16")
    with open_session(bundle, "onnxruntime", "unet") as session:
        assert session.device.type == "cuda"
        assert close(session.run(on_gpu(feeds))["out_sample"], bundle, feeds)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_profiles_are_switched(tmp_path: Path, kind: str) -> None:
    usable(kind)
    bundle = graph_bundle(tmp_path / "bundle", "fp16", ("unet", "vae_decoder", "text_encoder"))
    bundle = build_engine(bundle, kind, ranges=(SMALL, LARGE), components=("unet",))
    skip_foreign(bundle, kind)
    with open_session(bundle, kind, "unet", cuda_graphs=False) as session:
        # Batch with guidance and latents, and the profile that fits and is smallest.
        cases = [(4, 16, 0), (2, 32, 1), (2, 16, 0), (1, 24, 1), (4, 16, 0), (2, 32, 1)]
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        for index, (batch, size, profile) in enumerate(cases):
            feeds = unet_feeds("fp16", batch, size)
            with torch.cuda.stream(streams[index % 2]):  # no wait in between: a switch must wait for the last run
                result = session.run(on_gpu(feeds))["out_sample"]
            assert session._main.context.active_optimization_profile == profile  # type: ignore[attr-defined]
            torch.cuda.synchronize()
            assert close(result, bundle, feeds)
        with pytest.raises(RangeError, match=r"asked for batch 2 \(4 with guidance\), height 64 px.*covers all"):
            session.run(on_gpu(unet_feeds("fp16", 4, 32)))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("refit", REFIT)
def test_gpu_only_marked_weights_can_change(tmp_path: Path, kind: str, refit: str) -> None:
    bundle = real_unet(tmp_path / "bundle", kind, **({} if refit == "none" else {"refit": refit}))
    trt, feeds = require(kind), real_feeds(bundle)
    graph = onnx.load(bundle.path / bundle.component("unet").files[0].path).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    kernel, bias = (numpy_helper.to_array(stored[name]) for name in ("conv_out.weight", "conv_out.bias"))
    with open_session(bundle, kind, "unet") as session:
        expected = reference(bundle, "unet", feeds)
        assert torch.allclose(session.run(on_gpu(feeds))["out_sample"].cpu(), expected, atol=1e-3)
        engine = session._engine  # type: ignore[attr-defined]
        assert engine.refittable == (refit != "none")
        if refit == "none":
            return
        refitter = trt.Refitter(engine, recorder(kind))
        names = set(refitter.get_all_weights())
        assert "conv_out.weight" in names
        assert ("time_embedding.linear_1.weight" in names) == (refit == "all")
        zeros = np.zeros_like(kernel)
        assert refitter.set_named_weights("conv_out.weight", trt.Weights(zeros))
        assert refitter.refit_cuda_engine()
        changed = session.run(on_gpu(feeds))["out_sample"].cpu()
        assert torch.allclose(changed, torch.tensor(bias)[None, :, None, None].expand_as(changed), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_layers_say_their_precision(tmp_path: Path, kind: str) -> None:
    usable(kind)
    bundle = graph_unet(tmp_path / "bundle", "fp16", (kind,))
    skip_foreign(bundle, kind)
    layers = count_layers(bundle, kind, "unet")
    assert sum(number for _, _, number in layers) >= 1
    assert "fp16" in {precision for _, precision, _ in layers}
    (row,) = examine(bundle, layers=True)["engines"]
    assert row["problems"] == []
    assert row["layers"] == [{"type": kind, "precision": p, "count": n} for kind, p, n in layers]


def test_the_gpu_tests_are_marked() -> None:
    tree = ast.parse(Path(__file__).read_text())
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_gpu_")]
    assert len(tests) == 10
    assert all("gpu" in ast.unparse(node.decorator_list[0]) for node in tests)
