"""build_engine: what is built, checked, kept and refused, on graphs that take milliseconds; and on real components."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
from graph_bundles import ending, graph_bundle, graph_model, replace_component, unknown_operator
from onnx import TensorProto, helper, numpy_helper
from small_exports import bundle_copy

from export import build_engine, export_pipeline
from export.build import onnxruntime_graph
from export.build.job import Job
from export.build.parity import compare
from export.build.ranges import default_ranges
from sdkd.bundle.manifest import Bundle, EngineRecord, FileRecord
from sdkd.core.files import lock
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.errors import BuildError, BundleError, BusyError, InputError, MissingExtraError, ValuesError
from sdkd.targets import registry
from sdkd.targets.ort_attention import FUSED
from sdkd.targets.registry import environment, openvino_core

RUNNABLE = ("onnxruntime", "openvino")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A fresh fp32 bundle of small graphs."""
    return graph_bundle(tmp_path / "bundle")


@pytest.fixture(scope="module")
def prebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose UNet has an onnxruntime engine; copied by `built`."""
    made = graph_bundle(tmp_path_factory.mktemp("prebuilt") / "bundle")
    return build_engine(made, "onnxruntime", components=["unet"]).path


@pytest.fixture
def built(prebuilt: Path, tmp_path: Path) -> Bundle:
    """A fresh fp32 bundle with a fresh onnxruntime engine of the UNet."""
    shutil.copytree(prebuilt, tmp_path / "built")
    return Bundle.open(tmp_path / "built")


def _files(bundle: Bundle) -> dict[str, bytes]:
    return {str(file.relative_to(bundle.path)): file.read_bytes() for file in bundle.path.rglob("*") if file.is_file()}


def _built(bundle: Bundle, slot: str) -> dict[str, EngineRecord]:
    return {name: bundle.engine(slot, name) for name in bundle.manifest.components}


WIDE = Range(32, 32, 64)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with engines of all components for both targets, OpenVINO's for images up to 64 pixels high."""
    made = graph_bundle(tmp_path_factory.mktemp("everything") / "bundle")
    build_engine(made.path, "onnxruntime")
    return build_engine(made.path, "openvino", ranges=replace(default_ranges(made), height=WIDE))


@pytest.mark.parametrize("target", RUNNABLE)
def test_all_components_are_built_checked_and_recorded(everything: Bundle, target: str) -> None:
    assert everything.manifest == Bundle.open(everything.path).manifest
    ranges = default_ranges(everything)
    for name, record in _built(everything, target).items():
        assert (record.component, record.target, record.slot, record.precision) == (name, target, target, "fp32")
        assert record.ranges == (ranges if target == "onnxruntime" else replace(ranges, height=WIDE))
        assert record.environment == environment(target)
        assert record.onnx_sha256 == everything.component(name).onnx_sha256
        assert record.seconds > 0
        assert record.total_bytes > 100
        assert {file.path.split("/")[:2] == ["engines", target] for file in record.files} == {True}
        assert record.parity
        assert record.parity["finite"] is True
        assert record.parity["max_abs"] < 1e-5
        assert record.parity["relative"] < 1e-5
        assert record.parity["cosine"] > 0.999999
        assert len(record.parity["shapes"]) == 2
        everything.verify_files(record)
        assert everything.stale_reasons(record, environment(target)) == []
    shapes = {"onnxruntime": ["2x4x16x16", "1x4x16x16"], "openvino": ["2x4x16x16", "1x4x18x16"]}
    assert everything.engine(target, "unet").parity["shapes"] == shapes[target]  # type: ignore[index]


def test_flags_say_how_the_engine_was_made(everything: Bundle) -> None:
    flags = {"optimization": "extended", "provider": "cpu", "attention": "MultiHeadAttention"}
    assert everything.engine("onnxruntime", "text_encoder").flags == {**flags, "external_data": True}
    assert everything.engine("onnxruntime", "unet").flags == {**flags, "external_data": False}  # only small weights
    assert everything.engine("openvino", "unet").flags == {
        "config": {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"},
        "format": "blob",
        "inference_precision": "f32",
    }


def test_saved_onnxruntime_graph_stands_alone(everything: Bundle, tmp_path: Path) -> None:
    files = everything.engine("onnxruntime", "text_encoder").files
    for file in files:
        shutil.copy(everything.path / file.path, tmp_path)
    assert [Path(file.path).name for file in files] == ["text_encoder.onnx", "text_encoder.onnx.data"]
    session = onnxruntime.InferenceSession(str(tmp_path / "text_encoder.onnx"))
    feeds = {"input_ids": np.arange(77)[None]}
    expected = onnxruntime.InferenceSession(str(everything.path / "text_encoder/model.onnx")).run(None, feeds)
    for a, b in zip(session.run(None, feeds), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_saved_openvino_blob_opens_and_serves_all_its_shapes(everything: Bundle) -> None:
    record = everything.engine("openvino", "vae_decoder")
    blob = (everything.path / record.files[0].path).read_bytes()
    model = openvino_core().import_model(blob, "CPU", record.flags["config"])
    reference = onnxruntime.InferenceSession(str(everything.path / "vae_decoder/model.onnx"))
    for batch, height in ((1, 16), (4, 32), (3, 24)):
        latents = np.random.default_rng(batch).standard_normal((batch, 4, height, 16)).astype(np.float32)
        found = model({"latent_sample": latents})["sample"]
        expected = reference.run(None, {"latent_sample": latents})[0]
        assert found.shape == (batch, 3, 2 * height, 32)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="are incompatible"):
        model({"latent_sample": np.zeros((5, 4, 16, 16), np.float32)})


def test_openvino_makes_bf16_from_an_fp32_bundle(bundle: Bundle) -> None:
    try:
        result = build_engine(bundle, "openvino", precision="bf16", components=["unet"])
    except InputError as error:
        pytest.skip(str(error))
    record = result.engine("openvino-bf16", "unet")
    assert (record.target, record.slot, record.precision) == ("openvino", "openvino-bf16", "bf16")
    assert record.flags["inference_precision"] == "bf16"
    assert record.files[0].path == "engines/openvino-bf16/unet.blob"
    assert record.parity
    assert 1e-4 < record.parity["relative"] < 2e-2
    assert _said(bundle, "openvino-bf16") == ["unet: openvino-bf16 engine is fresh, reused"]


@pytest.mark.parametrize("target", RUNNABLE)
def test_half_precision_graphs_keep_their_slot(tmp_path: Path, target: str) -> None:
    bundle = graph_bundle(tmp_path / "bundle", "fp16")
    record = build_engine(bundle, target, components=["unet"]).engine(target, "unet")
    assert (record.precision, record.slot) == ("fp16", target)
    assert record.parity
    assert record.parity["relative"] < 2e-3


def test_what_is_fresh_is_kept_and_what_is_missing_is_built_beside_it(built: Bundle) -> None:
    before = _files(built)
    assert _said(built) == ["unet: onnxruntime engine is fresh, reused"]
    assert _files(built) == before
    assert _said(built, force=True) == ["unet: to build for onnxruntime (forced)"]
    said: list[str] = []
    parts = ["vae_decoder", "unet"]
    result = build_engine(built, "onnxruntime", components=parts, progress=lambda text, _: said.append(text))
    assert said[:2] == [
        "unet: onnxruntime engine is fresh, reused",
        "vae_decoder: to build for onnxruntime (not built yet)",
    ]
    assert said[-1] == "vae_decoder: done"
    assert list(result.manifest.engines) == ["onnxruntime/unet", "onnxruntime/vae_decoder"]
    assert result.engine("onnxruntime", "unet") == built.engine("onnxruntime", "unet")


def _said(bundle: Bundle, target: str = "onnxruntime", **options: Any) -> list[str]:
    """What is said of the UNet before anything is built."""
    heard: list[str] = []

    def hear(text: str, fraction: float | None) -> None:
        heard.append(text)
        if ": to build" in text:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        build_engine(bundle, target, components=["unet"], progress=hear, **options)
    return heard


def _other_weights(bundle: Bundle) -> None:
    model = graph_model("unet", "fp32")
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((4, 4, 3, 3), np.float32), "conv"))
    replace_component(bundle, "unet", model)


def _other_record(**changes: Any) -> Any:
    def change(bundle: Bundle) -> None:
        record = replace(bundle.engine("onnxruntime", "unet"), **changes)
        replace(bundle, manifest=bundle.manifest.with_engine(record)).save()

    return change


def _truncate(bundle: Bundle) -> None:
    file = bundle.path / "engines/onnxruntime/unet.onnx"
    file.write_bytes(file.read_bytes()[:-10])


STRIPPED = {"optimization": "extended", "provider": "cpu", "attention": FUSED, "options": {"strip_weights": True}}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_other_weights, "unet was exported again after the engine was built"),
        (_other_record(environment={"onnxruntime": "0.1"}), "built with onnxruntime 0.1, here it is"),
        (_other_record(flags={"optimization": "basic"}), "built with optimization basic, asked for extended"),
        (
            _other_record(flags=STRIPPED),
            "(built with the option strip_weights, which this version of sdkd does not have)",
        ),
        (_truncate, "truncated or altered"),
    ],
)
def test_a_stale_engine_is_to_be_built_again_and_the_reason_said(built: Bundle, change: Any, reason: str) -> None:
    change(built)
    (said,) = _said(built)
    assert reason in said


def test_an_engine_that_was_built_again_is_fresh(built: Bundle) -> None:
    _other_weights(built)
    wider = replace(default_ranges(built), width=WIDE)
    (said,) = _said(built, ranges=wider)
    assert "built for batch 1..4, height 32 px, width 32 px, 77 tokens, asked for batch 1..4, height 32 px, w" in said
    result = build_engine(built, "onnxruntime", components=["unet"], ranges=wider)
    record = result.engine("onnxruntime", "unet")
    assert record.ranges == wider
    result.verify_files(record)
    assert result.stale_reasons(record, environment("onnxruntime")) == []


def _alter(file: str, change: Any) -> Any:
    """Damages a file of a bundle: `change` of its bytes."""

    def damage(bundle: Bundle) -> None:
        path = bundle.path / file
        path.write_bytes(change(path.read_bytes()))

    return damage


ODD = ShapeRanges(Range(1, 1, 4), Range.fixed(501), Range.fixed(32), Range.fixed(77))
ONNX, RTX = "onnxruntime", "tensorrt-rtx"


@pytest.mark.parametrize(
    ("before", "target", "options", "message"),
    [
        (None, "tensorflow", {}, r"target 'tensorflow' is unknown: choose one of onnxruntime, openvino, tensorrt"),
        (None, ONNX, {"precision": "fp8"}, r"onnxruntime has no fp8"),
        (None, ONNX, {"precision": "fp16"}, r"cannot make a fp16 engine from an fp32 graph.*--precision fp16"),
        (None, RTX, {"precision": "bf16"}, r"tensorrt-rtx cannot make a bf16 engine from an fp32 graph"),
        (None, RTX, {}, r"is fp32, which tensorrt-rtx would build as a slow fp32 engine.*--precision fp16"),
        (None, "openvino-bf16", {"precision": "fp32"}, r"'openvino-bf16' means precision 'bf16', but 'fp32' was asked"),
        (None, ONNX, {"components": ["vae"]}, r"component 'vae' is unknown: choose from text_encoder, text_encoder_2"),
        (None, ONNX, {"components": []}, r"component 'none' is unknown"),
        (None, ONNX, {"ranges": ODD}, r"height 501 is not a multiple of 4 pixels.*use 500 or 504"),
        (
            lambda bundle: graph_bundle(bundle.path, "bf16"), ONNX, {},
            r"graph is bf16, which onnxruntime cannot run: export it with --precision fp32",
        ),
        (lambda bundle: (bundle.path / "bundle.json").unlink(), ONNX, {}, r"not a bundle \(no bundle.json\)"),
        (
            _alter("unet/model.onnx", lambda data: data[:-1]), ONNX, {},
            r"unet/model.onnx has \d+ bytes instead of \d+ \(truncated or altered\).*sdkd export",
        ),
        (
            _alter("unet/model.onnx.data", lambda data: data[:-1] + bytes([data[-1] ^ 1])), ONNX, {},
            r"unet/model.onnx.data was altered: its SHA-256 differs.*sdkd export",
        ),
        (
            lambda bundle: (bundle.path / "unet/model.onnx.data").unlink(), ONNX, {},
            r"unet/model.onnx.data is missing.*sdkd export",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused(
    bundle: Bundle, before: Any, target: str, options: dict[str, Any], message: str
) -> None:
    if before:
        before(bundle)
    files = _files(bundle)
    with pytest.raises(BundleError if before and "bf16" not in message else InputError, match=message):
        build_engine(bundle, target, **options)
    assert _files(bundle) == files


CASES = {
    "other tensors": (
        lambda bundle: ending(bundle, "Cast", onnx.TensorProto.INT64, to=onnx.TensorProto.INT64),
        (BuildError, r"unet for \w+: the graph's outputs are out_sample int64.*out_sample float32"),
    ),
    "NaN": (
        lambda bundle: ending(bundle, "Log"),
        (ValuesError, r"the \w+ engine of unet \(fp32\) gives NaN or infinity at 2x4x16x16"),
    ),
    "no operator": (
        unknown_operator,
        (BuildError, r"(?s)unet could not be built for \w+: .*Convolve.*Try this: update"),
    ),
}


@pytest.mark.parametrize("target", RUNNABLE)
@pytest.mark.parametrize("case", CASES)
def test_a_failed_build_says_what_and_why_and_keeps_the_rest(built: Bundle, target: str, case: str) -> None:
    change, (error, message) = CASES[case]
    change(built)
    before = _files(built)
    with pytest.raises(error, match=message):
        build_engine(built, target)
    assert _files(built) == before  # the old engine is still there, nothing half-written
    assert not list(built.path.rglob("*.partial"))


def test_a_failed_save_puts_the_old_engine_back(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _files(built)

    def full(self: Bundle) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Bundle, "save", full)
    with pytest.raises(
        BuildError, match=r"no space left for the engines in '.*built' \(.* free\): nothing was changed"
    ):
        build_engine(built, "onnxruntime", components=["unet", "vae_decoder"], force=True)
    assert _files(built) == before


def test_two_builds_at_once_are_refused(bundle: Bundle) -> None:
    with lock(bundle.path), pytest.raises(BusyError, match="is being written by another process"):
        build_engine(bundle, "onnxruntime")


def test_ctrl_c_leaves_bundle_and_folders_as_they_were(built: Bundle) -> None:
    before, children = _files(built), psutil.Process().children()  # other tests' that nobody has waited for yet
    main = threading.main_thread().ident
    assert main

    def interrupt(message: str, fraction: float | None) -> None:
        if message == "unet: compiling":
            signal.pthread_kill(main, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        build_engine(built, "openvino", progress=interrupt)
    assert _files(built) == before
    assert sorted(path.name for path in (built.path / "engines").iterdir()) == ["onnxruntime"]
    assert set(psutil.Process().children()) <= set(children)


def test_a_build_never_touches_the_files_of_the_manifest(built: Bundle) -> None:
    """Killed at any moment, a build leaves engines that match; who opened the bundle just before finds the new ones."""
    from engines.sessions.opening import open_session

    old = built.engine("onnxruntime", "unet")
    seen: list[str] = []

    def look(message: str, fraction: float | None) -> None:
        now = Bundle.open(built.path)
        now.verify_files(now.engine("onnxruntime", "unet"))
        seen.append(message)

    left = built.path / "engines" / ".openvino.abc.partial"
    left.mkdir(parents=True)
    (left / "unet.blob").write_bytes(b"half")
    for _ in range(2):
        (built.path / "engines/onnxruntime/build-0123abcd").mkdir()
        (built.path / "engines/onnxruntime/build-0123abcd" / "unet.onnx").write_bytes(b"of a killed build")
        now = build_engine(built.path, "onnxruntime", components=["unet"], force=True, progress=look)
        record = now.engine("onnxruntime", "unet")
        now.verify_files(record)
        places = {file.relative_to(built.path).as_posix() for file in (built.path / "engines").rglob("unet.*")}
        assert places == {file.path for file in record.files}
        assert len(list((built.path / "engines/onnxruntime").glob("build-*"))) <= 1
    assert "unet: done" in seen
    assert [path.name for path in (built.path / "engines").iterdir()] == ["onnxruntime"]
    assert old.files != record.files
    with open_session(built, "onnxruntime", "unet") as session:  # its manifest is two builds old
        assert session.checked.record == record


@pytest.mark.parametrize(("module", "target"), [("openvino", "openvino"), ("tensorrt_rtx", RTX)])
def test_a_missing_extra_names_the_pip_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, target: str
) -> None:
    bundle = graph_bundle(tmp_path / "bundle", "fp16")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"needs the package '{module}'.*pip install 'sdkd\[{target}\]'"):
        build_engine(bundle, target)
    assert not (bundle.path / "engines").exists()


def test_compare_figures() -> None:
    a = np.array([1.0, 2.0, 2.0], np.float32)
    assert compare(a, a) == {"max_abs": 0.0, "relative": 0.0, "cosine": pytest.approx(1.0), "finite": True}
    half = compare(a / 2, a)
    assert half == {"max_abs": 1.0, "relative": pytest.approx(0.5), "cosine": pytest.approx(1.0), "finite": True}
    assert compare(np.array([1.0, np.inf, 0.0]), a)["finite"] is False
    assert compare(np.zeros(2), a)["finite"] is False  # another size never passes


def test_importing_the_builders_loads_no_heavy_library() -> None:
    code = (
        "import sys, export.build.engines, export.build_cli, export.build.tensorrt_plan, "
        "export.build.onnxruntime_graph, export.build.openvino_blob, export.build.parity, sdkd.core.child; "
        "print([n for n in ('torch', 'onnx', 'onnxruntime', 'openvino', 'tensorrt_rtx', 'polygraphy', 'numpy') "
        "if n in sys.modules])"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"


def test_attention_of_a_float_graph_becomes_onnxruntime_s_own(tmp_path: Path) -> None:
    bundle = bundle_copy(tmp_path / "bundle")
    file = bundle.path / "unet/model.onnx"
    onnx.save(onnx.load(file), file, save_as_external_data=True, location="model.onnx.data", size_threshold=1024)
    files = tuple(FileRecord.of(bundle.path, file.with_name(name)) for name in ("model.onnx", "model.onnx.data"))
    changed = {**bundle.manifest.components, "unet": replace(bundle.component("unet"), files=files)}
    bundle = Bundle(bundle.path, replace(bundle.manifest, components=changed))
    bundle.save()
    record = build_engine(bundle, "onnxruntime", components=["unet"]).engine("onnxruntime", "unet")
    nodes = onnx.load(bundle.path / record.files[0].path, load_external_data=False).graph.node
    assert [node.op_type for node in nodes if "Attention" in node.op_type] == ["MultiHeadAttention"] * 6
    assert record.flags["attention"] == "MultiHeadAttention"
    assert record.parity["relative"] < 1e-5  # type: ignore[index]


def test_every_engine_needs_onnxruntime_and_is_refused_at_once_without(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(registry, "packages_of", lambda target: [])
    monkeypatch.setattr(registry, "driver_version", lambda: None)
    for target, purpose in (("onnxruntime", "target 'onnxruntime'"), ("openvino", "the comparison of an engine with")):
        with pytest.raises(MissingExtraError, match=rf"{purpose}.* needs the package .* pip install 'sdkd\[cpu\]'"):
            build_engine(bundle, target)
    with pytest.raises(MissingExtraError, match=r"the comparison of an export with PyTorch needs .*'sdkd\[cpu\]'"):
        export_pipeline("demo", bundle.path / "other")
    assert Bundle.open(bundle.path).slots() == ()
    assert not (bundle.path / "other").exists()


# A machine with CUDA


def test_a_graph_made_for_the_cpu_does_not_pass_for_one_made_for_cuda(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this package has CUDA")
    monkeypatch.setattr(onnxruntime_graph, "usual_provider", lambda: "cuda")  # here, and not in the child that builds
    assert onnxruntime_graph.flags("fp32", "fp32") == {"optimization": "extended", "provider": "cuda"}
    with pytest.raises(BuildError, match=r"was asked for CUDAExecutionProvider and gave CPUExecutionProvider"):
        build_engine(bundle, "onnxruntime", components=["unet"])
    assert Bundle.open(bundle.path).slots() == ()


def test_for_the_plugin_the_graph_stays_as_it_was_exported(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_graph, "usual_provider", lambda: "tensorrt-rtx")
    assert onnxruntime_graph.flags("fp16", "fp16") == {"optimization": "none", "provider": "tensorrt-rtx"}
    assert onnxruntime_graph.half_precision() == "fp16"
    with pytest.raises(InputError, match=r"on NvTensorRTRTXExecutionProvider here, which has no kernels for its int8"):
        onnxruntime_graph.flags("int8", "fp32")
    graph, contract = str(bundle.path / "unet/model.onnx"), bundle.component("unet").contract
    job = Job("unet", "onnxruntime", "fp32", graph, str(bundle.path), contract, (), ())
    weights = onnxruntime_graph._save(job, bundle.path / "unet.onnx", "tensorrt-rtx")
    found, exported = (onnx.load(file) for file in (bundle.path / "unet.onnx", job.onnx))
    assert [node.op_type for node in found.graph.node] == [node.op_type for node in exported.graph.node]
    own, theirs = (
        {one.name: numpy_helper.to_array(one) for one in each.graph.initializer} for each in (found, exported)
    )
    assert all(np.array_equal(own[name], array) for name, array in theirs.items())
    assert weights.name == "unet.onnx.data"


def test_an_engine_is_built_again_where_cuda_began_to_run(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_graph, "usual_provider", lambda: "cpu")
    assert _said(built) == ["unet: onnxruntime engine is fresh, reused"]
    monkeypatch.setattr(onnxruntime_graph, "usual_provider", lambda: "cuda")
    assert "built with provider cpu, asked for cuda" in _said(built)[0]


def test_copies_between_devices_leave_the_saved_graph(tmp_path: Path) -> None:
    """(x + 1) * 2 and its square, as ONNX Runtime saves a graph of which some nodes run on another device."""
    nodes = [
        helper.make_node("MemcpyFromHost", ["x"], ["x_CUDA"]),
        helper.make_node("Add", ["x_CUDA", "one"], ["sum_CUDA"]),
        helper.make_node("MemcpyToHost", ["sum_CUDA"], ["sum"]),  # a graph's output, which a node reads, too
        helper.make_node("Mul", ["sum", "two"], ["double"]),
        helper.make_node("MemcpyFromHost", ["double"], ["double_CUDA"]),
        helper.make_node("MemcpyToHost", ["double_CUDA"], ["double_again"]),
        helper.make_node("Mul", ["double_again", "double_CUDA"], ["square"]),
    ]
    x, *outputs = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "sum", "double", "square")
    )
    weights = [numpy_helper.from_array(np.full(2, value, np.float32), name) for name, value in (("one", 1), ("two", 2))]
    graph = helper.make_graph(nodes, "copies", [x], outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    file, data = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    onnx.save(model, file, save_as_external_data=True, location=data.name, size_threshold=0)
    before = data.read_bytes()
    onnxruntime_graph._without_copies(file)
    assert data.read_bytes() == before  # weights beside the graph stay where they are
    onnx.checker.check_model(file)
    assert [node.op_type for node in onnx.load(file).graph.node] == ["Add", "Mul", "Mul"]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": np.array([1, 2], dtype=np.float32)})
    assert [array.tolist() for array in found] == [[2.0, 3.0], [4.0, 6.0], [16.0, 36.0]]
