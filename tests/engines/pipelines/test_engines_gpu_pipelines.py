"""On a GPU, for every TensorRT kind that is there: whole pipelines, other weights, memory that runs out, long runs."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import agree, draw, save_lora
from engine_bundles import RANGES, graph_unet, pipeline_bundle, reference, unet_feeds
from gpu_engines import KINDS, for_this_gpu, graph_for_gpu, on_gpu, skip_foreign, usable
from graph_bundles import CONFIGS, Graph, graph_bundle, graph_model, replace_component
from onnx import helper
from small_bundles import CALLS, SIZES, small_modules
from small_exports import bundle_copy
from small_exports import small_pipeline as exported_pipeline

from engines import load_pipeline, plug
from engines.sessions.opening import open_session
from export import export_pipeline
from export.build.engines import build_engine
from export.build.options import BuildOptions
from sdkd.bundle.manifest import Bundle
from sdkd.core.contract import Precision
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.errors import OutOfMemoryError
from sdkd.workflow import rebuild

MB = 1 << 20
HUGE = ShapeRanges(Range(1, 1, 8), Range(32, 32, 2048), Range(32, 32, 2048), Range.fixed(77))
HIDDEN = 1 << 21  # of a graph with 268 MB of weights in float16
ONE_SIZE = ShapeRanges(Range(1, 1, 2), Range.fixed(32), Range.fixed(32), Range.fixed(77))


def close_to(found: torch.Tensor, expected: torch.Tensor, most: float) -> None:
    """Relative distance at most `most`."""
    found, expected = found.double().cpu(), expected.double().cpu()
    assert found.isfinite().all()
    assert float((found - expected).norm() / expected.norm()) < most


@pytest.fixture(scope="module", params=KINDS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A whole small pipeline on one kind, in float32: 32 to 64 px, up to 2 images."""
    kind = str(request.param)
    usable(kind)
    bundle = pipeline_bundle(tmp_path_factory.mktemp("whole") / "bundle", targets=())
    bundle = build_engine(bundle, kind, precision="fp32", ranges=RANGES)
    skip_foreign(bundle, kind)
    return kind, bundle.path


@pytest.fixture(scope="module", params=KINDS)
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A hand-written UNet in float16: 32 to 64 px, up to 2 images."""
    return graph_for_gpu(tmp_path_factory.mktemp("small") / "bundle", request.param)


# Against eager


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("precision", "most"), [("fp16", 3e-2), ("fp32", 1e-3)])
def test_gpu_every_component_equals_eager(tmp_path: Path, kind: str, precision: Precision, most: float) -> None:
    usable(kind)
    bundle = export_pipeline(exported_pipeline(), tmp_path / "bundle", precision=precision, verify=False)
    bundle = build_engine(bundle, kind, precision=precision, ranges=RANGES)
    skip_foreign(bundle, kind)
    generator = torch.Generator().manual_seed(0)
    for component, module in small_modules().items():
        contract = bundle.component(component).contract
        feeds = {}
        for spec in contract.inputs:
            shape = spec.shape(SIZES)
            if spec.dtype == "int64":
                feeds[spec.name] = torch.randint(0, 600, shape, generator=generator)
            else:
                feeds[spec.name] = torch.randn(shape, generator=generator).to(getattr(torch, spec.dtype))
        feeds |= {"timestep": torch.tensor(250.0)} if component == "unet" else {}
        with torch.no_grad():
            eager = CALLS[component](
                copy.deepcopy(module).float(), *(t.float() if t.is_floating_point() else t for t in feeds.values())
            )
        expected = eager if isinstance(eager, tuple) else (eager,)
        with open_session(bundle, kind, component) as session:
            for _ in range(3):  # plainly, with capture, by replay
                found = session.run(on_gpu(feeds))
                for spec, answer in zip(contract.outputs, expected, strict=True):
                    close_to(found[spec.name], answer, most)


def test_gpu_onnxruntime_waits_for_the_callers_stream(tmp_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    bundle, feeds = graph_unet(tmp_path / "bundle", "fp16", ("onnxruntime",)), unet_feeds("fp16")
    big = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()  # it was made on the default stream
    with open_session(bundle, "onnxruntime", "unet") as session, torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(5):
            late = on_gpu(feeds)
            sample, late["sample"] = late["sample"], torch.full_like(late["sample"], float("nan"))
            for _ in range(10):
                big = (big @ big).clamp(-1, 1)  # keeps the stream busy while the input is made
            late["sample"].copy_(sample)
            result = session.run(late)["out_sample"] * 2
            late["sample"].fill_(float("nan"))
            close_to(result / 2, reference(bundle, "unet", feeds), 2e-2)


# Other weights


def adaptable(folder: Path, kind: str, refit: str) -> Bundle:
    """The exported pipeline on one kind, its UNet for a LoRA by refit, or by rebuilding where `refit` is `none`."""
    usable(kind)
    options = BuildOptions(refit=refit, **({} if refit == "none" else for_this_gpu(kind)))
    bundle = build_engine(
        bundle_copy(folder), kind, precision="fp32", ranges=ONE_SIZE, components=("unet",), options=options
    )
    bundle = build_engine(
        bundle, kind, precision="fp32", ranges=ONE_SIZE, components=("text_encoder", "vae_decoder", "vae_encoder")
    )
    skip_foreign(bundle, kind)
    return bundle


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("refit", ["lora", "all", "none"])
def test_gpu_loras_are_exact_and_come_off(tmp_path: Path, kind: str, refit: str) -> None:
    bundle = adaptable(tmp_path / "bundle", kind, refit)
    loras = {name: save_lora(exported_pipeline(), tmp_path / name, seed) for name, seed in (("a", 1), ("b", 2))}
    pipe, eager = plug(exported_pipeline(), bundle, kind, rebuild=rebuild), exported_pipeline()
    before = draw(pipe)
    agree(before, draw(eager), 40)
    drawn = {}
    for name in ("a", "b"):
        for one in (pipe, eager):
            one.load_lora_weights(loras[name], adapter_name=name)
            one.set_adapters(name, 0.8)
        drawn[name] = draw(pipe)
        agree(drawn[name], draw(eager), 40)
        assert np.abs(drawn[name] - before).max() > 0.02
    for one in (pipe, eager):
        one.set_adapters(["a", "b"], [0.4, -0.3])
    agree(draw(pipe), draw(eager), 40)
    pipe.set_adapters("a", 0.8)
    back = draw(pipe)
    pipe.unload_lora_weights()
    removed = draw(pipe)
    if kind == "tensorrt":  # TensorRT-RTX may change to faster kernels between two calls
        np.testing.assert_array_equal(back, drawn["a"])  # A after B is A
    else:
        agree(back, drawn["a"], 60)
    if kind == "tensorrt" and refit == "none":
        np.testing.assert_array_equal(removed, before)
    else:  # weights that were folded together when the engine was built need not be so when it is refitted
        agree(removed, before, 60)


# Memory that runs out


@contextmanager
def limited(more: int) -> Iterator[None]:
    """Torch's allocator may take `more` bytes beyond what it has now."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + more) / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def huge_unet(folder: Path, kind: str) -> Bundle:
    """The hand-written UNet for up to 8 images of 2048 px, and a config without attention: its scores were too many."""
    bundle = graph_bundle(folder, "fp16", ("unet", "vae_decoder", "text_encoder"))
    config = {**CONFIGS["unet"], "down_block_types": ["DownBlock2D"] * 2}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    return build_engine(bundle, kind, precision="fp16", ranges=HUGE, components=("unet",))


@pytest.mark.parametrize("kind", KINDS)
def test_gpu_a_run_without_memory_is_told_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    usable(kind)
    bundle = huge_unet(tmp_path / "bundle", kind)
    skip_foreign(bundle, kind)
    modest, large = unet_feeds("fp16", 2, 16), on_gpu(unet_feeds("fp16", 16, 1024))  # 128 MiB in, as much out
    with open_session(bundle, kind, "unet") as session:
        expected = session.run(on_gpu(modest))["out_sample"].cpu()
        before = torch.cuda.memory_allocated()
        with limited(64 * MB):
            for _ in range(3):
                with pytest.raises(
                    OutOfMemoryError,
                    match=rf"the {kind} engine of unet in '.*', run at batch 16, height 1024, width 1024, sequence 77, "
                    r"ran out of GPU memory \(CUDA out of memory.*are free now\. Ask for fewer images at once",
                ):
                    session.run(large)
                assert torch.cuda.memory_allocated() == before
            close_to(session.run(on_gpu(modest))["out_sample"], expected, 1e-2)
        close_to(session.run(large)["out_sample"], reference(bundle, "unet", {k: t.cpu() for k, t in large.items()}),
                 2e-2)  # fmt: skip


def heavy_unet(folder: Path, kind: str) -> Bundle:
    """The hand-written UNet with 268 MB of weights, in float16."""
    usable(kind)
    bundle = graph_bundle(folder, "fp16", ("unet", "vae_decoder", "text_encoder"))
    model = graph_model("unet", "fp16")
    g = Graph("fp16")
    context = int(CONFIGS["unet"]["cross_attention_dim"])
    wide = g.weight("wide", context, HIDDEN, scale=0.01)
    back = g.weight("back", HIDDEN, context, scale=0.01 / HIDDEN**0.5)
    g.add("MatMul", ["pooled", wide], "widened")
    g.add("MatMul", ["widened", back], "narrowed")
    g.add("Add", ["pooled", "narrowed"], "enriched")
    place = next(index for index, node in enumerate(model.graph.node) if "to_out" in node.input)
    model.graph.node[place].input[0] = "enriched"
    nodes = [*model.graph.node[:place], *g.nodes, *model.graph.node[place:]]
    graph = helper.make_graph(
        nodes, "unet", model.graph.input, model.graph.output, [*model.graph.initializer, *g.weights]
    )
    heavy = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    bundle = build_engine(replace_component(bundle, "unet", heavy), kind, ranges=RANGES, components=("unet",))
    skip_foreign(bundle, kind)
    return bundle


@contextmanager
def filled(left: int) -> Iterator[None]:
    """Hold all memory of the GPU but about `left` bytes."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    held = []
    try:
        while torch.cuda.mem_get_info()[0] > left + 32 * MB:
            held.append(torch.empty(32 * MB, dtype=torch.uint8, device="cuda"))
        yield
    finally:
        held.clear()
        torch.cuda.empty_cache()


@pytest.mark.parametrize("kind", KINDS)
def test_gpu_an_engine_that_does_not_fit_is_told_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    heavy = heavy_unet(tmp_path / "heavy", kind)
    light = graph_for_gpu(tmp_path / "light", kind)
    feeds = unet_feeds("fp16")
    with open_session(light, kind, "unet") as session:
        expected = session.run(on_gpu(feeds))["out_sample"].cpu()
        with filled(96 * MB):
            with pytest.raises(OutOfMemoryError, match=r"ran out of GPU memory"):  # what stays, stays once
                open_session(heavy, kind, "unet")
            before = torch.cuda.mem_get_info()[0]
            for _ in range(3):
                with pytest.raises(
                    OutOfMemoryError, match=rf"opening the {kind} engine of unet .* ran out of GPU memory"
                ):
                    open_session(heavy, kind, "unet")
            assert before - torch.cuda.mem_get_info()[0] < 32 * MB
            close_to(session.run(on_gpu(feeds))["out_sample"], expected, 1e-2)
        with open_session(heavy, kind, "unet") as again:
            close_to(again.run(on_gpu(feeds))["out_sample"], reference(heavy, "unet", feeds), 2e-2)


# Several pipelines, long runs


def test_gpu_two_pipelines_in_one_process(whole: tuple[str, Path]) -> None:
    kind, path = whole
    pipes = [load_pipeline(path, kind) for _ in range(2)]
    alone = {size: draw(pipes[0], height=size, width=size) for size in (32, 64)}
    assert load_pipeline(path).unet.session.slot == kind

    def bits(image: np.ndarray, other: np.ndarray) -> None:
        if kind == "tensorrt":
            np.testing.assert_array_equal(image, other)
        else:  # it may change to faster kernels between two calls
            agree(image, other, 60)

    for turn in range(3):  # in turn, on one stream
        for index, pipe in enumerate(pipes):
            size = 32 if (turn + index) % 2 else 64
            bits(draw(pipe, height=size, width=size), alone[size])
    found: dict[int, list[np.ndarray]] = {0: [], 1: []}
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                found[index] = [draw(pipes[index], height=size, width=size) for size in (32, 64) * 4]
        except BaseException as error:  # noqa: BLE001 - told by the test, not by the thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for images in found.values():
        for image, size in zip(images, (32, 64) * 4, strict=True):
            bits(image, alone[size])
    for part in ("unet", "vae", "text_encoder"):
        getattr(pipes[0], part).close()
    bits(draw(pipes[1]), draw(pipes[1]))  # the other one lives on


def test_gpu_a_thousand_images_take_no_more_memory(whole: tuple[str, Path]) -> None:
    import psutil

    kind, path = whole
    pipe = load_pipeline(path, kind)
    pipe.set_progress_bar_config(disable=True)

    def images(count: int, seed: int) -> None:
        size = (32, 64)[seed % 2]
        generators = [torch.Generator().manual_seed(seed + number) for number in range(count)]
        drawn = pipe(["a cat"] * count, num_inference_steps=2, height=size, width=size, generator=generators,
                     output_type="np").images  # fmt: skip
        assert np.isfinite(drawn).all()
        assert drawn.shape == (count, size, size, 3)

    def taken() -> tuple[int, int, int]:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return torch.cuda.memory_allocated(), total - free, psutil.Process().memory_info().rss

    for seed in range(50):  # every shape plainly, with capture, by replay
        images(1 + seed % 2, seed)
    before = taken()
    done = seed = 0
    while done < 1000:
        images(1 + seed % 2, seed)
        done, seed = done + 1 + seed % 2, seed + 1
    after = taken()
    assert after[0] <= before[0]  # what torch holds
    assert after[1] - before[1] <= 16 * MB  # what the GPU has lost, whoever took it
    assert after[2] - before[2] <= 64 * MB  # the process on the host


def test_gpu_sessions_that_come_and_go_leave_nothing(small: Bundle) -> None:
    kind = small.slots()[0]
    feeds = on_gpu(unet_feeds("fp16"))

    def once() -> None:
        with open_session(small, kind, "unet") as session:
            for _ in range(3):
                session.run(feeds)

    def free() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    for _ in range(5):
        once()
    before, allocated = free(), torch.cuda.memory_allocated()
    for _ in range(50):
        once()
    assert torch.cuda.memory_allocated() == allocated
    assert before - free() <= 16 * MB
