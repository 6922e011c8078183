"""build_engine: what is built, checked, kept and refused, on graphs that take milliseconds; and on real components."""

from __future__ import annotations

import importlib.abc
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graph_bundles import graph_bundle, graph_model, replace_component
from onnx import helper, numpy_helper
from small_exports import bundle_copy

from export import build_engine
from export.build.job import Job
from export.build.parity import compare
from export.build.ranges import default_ranges
from sdkd.bundle.manifest import Bundle, EngineRecord, FileRecord
from sdkd.core.files import lock
from sdkd.core.profiles import Range
from sdkd.errors import BuildError, BundleError, BusyError, InputError, MissingExtraError, ValuesError
from sdkd.targets.registry import environment

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


def _messages(into: list[str]) -> Any:
    return lambda message, fraction: into.append(message)


@pytest.mark.parametrize("target", RUNNABLE)
def test_all_components_are_built_checked_and_recorded(bundle: Bundle, target: str) -> None:
    result = build_engine(bundle.path, target)
    assert result.manifest == Bundle.open(bundle.path).manifest
    for name, record in _built(result, target).items():
        assert (record.component, record.target, record.slot, record.precision) == (name, target, target, "fp32")
        assert record.ranges == default_ranges(bundle)
        assert record.environment == environment(target)
        assert record.onnx_sha256 == bundle.component(name).onnx_sha256
        assert record.seconds > 0
        assert record.total_bytes > 100
        assert {file.path.split("/")[:2] == ["engines", target] for file in record.files} == {True}
        assert record.parity
        assert record.parity["finite"] is True
        assert record.parity["max_abs"] < 1e-5
        assert record.parity["relative"] < 1e-5
        assert record.parity["cosine"] > 0.999999
        assert len(record.parity["shapes"]) == 2
        result.verify_files(record)
        assert result.stale_reasons(record, environment(target)) == []
    assert result.engine(target, "unet").parity["shapes"] == ["2x4x16x16", "1x4x16x16"]  # type: ignore[index]


def test_flags_say_how_the_engine_was_made(bundle: Bundle) -> None:
    build_engine(bundle, "onnxruntime", components=["unet", "text_encoder"])
    result = build_engine(bundle, "openvino", components=["unet"])
    flags = {"optimization": "extended", "provider": "cpu", "attention": "MultiHeadAttention"}
    assert result.engine("onnxruntime", "text_encoder").flags == {**flags, "external_data": True}
    assert result.engine("onnxruntime", "unet").flags == {**flags, "external_data": False}  # only small weights
    assert result.engine("openvino", "unet").flags == {
        "config": {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"},
        "format": "blob",
        "inference_precision": "f32",
    }


def test_saved_onnxruntime_graph_stands_alone(bundle: Bundle, tmp_path: Path) -> None:
    import onnxruntime as ort

    record = build_engine(bundle, "onnxruntime", components=["text_encoder"]).engine("onnxruntime", "text_encoder")
    alone = tmp_path / "elsewhere"
    alone.mkdir()
    for file in record.files:
        shutil.copy(bundle.path / file.path, alone)
    assert [Path(file.path).name for file in record.files] == ["text_encoder.onnx", "text_encoder.onnx.data"]
    session = ort.InferenceSession(str(alone / "text_encoder.onnx"))
    feeds = {"input_ids": np.arange(77)[None]}
    expected = ort.InferenceSession(str(bundle.path / "text_encoder/model.onnx")).run(None, feeds)
    for a, b in zip(session.run(None, feeds), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_saved_openvino_blob_opens_and_serves_all_its_shapes(bundle: Bundle) -> None:
    import onnxruntime as ort

    from sdkd.targets.registry import openvino_core

    ranges = replace(default_ranges(bundle), height=Range(32, 32, 64))
    record = build_engine(bundle, "openvino", components=["vae_decoder"], ranges=ranges).engine(
        "openvino", "vae_decoder"
    )
    blob = (bundle.path / record.files[0].path).read_bytes()
    model = openvino_core().import_model(blob, "CPU", record.flags["config"])
    reference = ort.InferenceSession(str(bundle.path / "vae_decoder/model.onnx"))
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
    again: list[str] = []
    assert build_engine(bundle, "openvino-bf16", components=["unet"], progress=_messages(again)).manifest == (
        result.manifest
    )
    assert again == ["unet: openvino-bf16 engine is fresh, reused"]


@pytest.mark.parametrize("target", RUNNABLE)
def test_half_precision_graphs_keep_their_slot(tmp_path: Path, target: str) -> None:
    bundle = graph_bundle(tmp_path / "bundle", "fp16")
    record = build_engine(bundle, target, components=["unet"]).engine(target, "unet")
    assert (record.precision, record.slot) == ("fp16", target)
    assert record.parity
    assert record.parity["relative"] < 2e-3


def test_a_fresh_engine_is_kept_and_said_to_be(built: Bundle) -> None:
    before, said = _files(built), list[str]()
    result = build_engine(built, "onnxruntime", components=["unet"], progress=_messages(said))
    assert result.manifest == built.manifest
    assert _files(built) == before
    assert said == ["unet: onnxruntime engine is fresh, reused"]


def test_force_builds_again(built: Bundle) -> None:
    said: list[str] = []
    build_engine(built, "onnxruntime", components=["unet"], force=True, progress=_messages(said))
    assert said[0] == "unet: to build for onnxruntime (forced)"
    assert said[-1] == "unet: done"


def _other_weights(bundle: Bundle) -> None:
    model = graph_model("unet", "fp32")
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((4, 4, 3, 3), np.float32), "conv"))
    replace_component(bundle, "unet", model)


def _change_record(bundle: Bundle, **changes: Any) -> None:
    opened = Bundle.open(bundle.path)
    record = replace(opened.engine("onnxruntime", "unet"), **changes)
    replace(opened, manifest=opened.manifest.with_engine(record)).save()


def _other_version(bundle: Bundle) -> None:
    _change_record(bundle, environment={**environment("onnxruntime"), "onnxruntime": "0.1"})


def _other_flags(bundle: Bundle) -> None:
    _change_record(bundle, flags={"optimization": "basic", "provider": "cpu"})


def _truncate(bundle: Bundle) -> None:
    file = bundle.path / "engines/onnxruntime/unet.onnx"
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_other_weights, "unet was exported again after the engine was built"),
        (_other_version, "built with onnxruntime 0.1, here it is"),
        (_other_flags, "built with optimization basic, asked for extended"),
        (_truncate, "truncated or altered"),
    ],
)
def test_a_stale_engine_is_built_again_and_the_reason_said(built: Bundle, change: Any, reason: str) -> None:
    change(built)
    said: list[str] = []
    result = build_engine(built, "onnxruntime", components=["unet"], progress=_messages(said))
    assert reason in said[0]
    assert said[-1] == "unet: done"
    result.verify_files(result.engine("onnxruntime", "unet"))
    assert result.stale_reasons(result.engine("onnxruntime", "unet"), environment("onnxruntime")) == []


def test_other_ranges_are_a_reason(built: Bundle) -> None:
    wider = replace(default_ranges(built), width=Range(32, 32, 64))
    said: list[str] = []
    result = build_engine(built, "onnxruntime", components=["unet"], ranges=wider, progress=_messages(said))
    assert "built for batch 1..4, height 32 px, width 32 px, 77 tokens, asked for batch 1..4" in said[0]
    assert result.engine("onnxruntime", "unet").ranges == wider


def test_what_is_missing_is_built_beside_what_is_there(built: Bundle) -> None:
    said: list[str] = []
    result = build_engine(built, "onnxruntime", components=["vae_decoder", "unet"], progress=_messages(said))
    assert said[:2] == [
        "unet: onnxruntime engine is fresh, reused",
        "vae_decoder: to build for onnxruntime (not built yet)",
    ]
    assert list(result.manifest.engines) == ["onnxruntime/unet", "onnxruntime/vae_decoder"]
    assert result.engine("onnxruntime", "unet") == built.engine("onnxruntime", "unet")


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("tensorflow", {}, r"target 'tensorflow' is unknown: choose one of onnxruntime, openvino, tensorrt"),
        ("onnxruntime", {"precision": "fp8"}, r"precision 'fp8' is unknown"),
        ("onnxruntime", {"precision": "fp16"}, r"cannot make a fp16 engine from an fp32 graph.*--precision fp16"),
        ("tensorrt-rtx", {"precision": "bf16"}, r"tensorrt-rtx cannot make a bf16 engine from an fp32 graph"),
        ("tensorrt-rtx", {}, r"is fp32, which tensorrt-rtx would build as a slow fp32 engine.*--precision fp16"),
        ("openvino-bf16", {"precision": "fp32"}, r"'openvino-bf16' means precision 'bf16', but 'fp32' was asked for"),
        ("onnxruntime", {"components": ["vae"]}, r"component 'vae' is unknown: choose from text_encoder, unet"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(bundle: Bundle, target: str, options: dict[str, Any], message: str) -> None:
    before = _files(bundle)
    with pytest.raises(InputError, match=message):
        build_engine(bundle, target, **options)
    assert _files(bundle) == before


@pytest.mark.parametrize("target", RUNNABLE)
def test_a_bf16_graph_is_refused_where_it_cannot_run(tmp_path: Path, target: str) -> None:
    bundle = graph_bundle(tmp_path / "bundle", "bf16")
    with pytest.raises(InputError, match=rf"graph is bf16, which {target} cannot run: export it with --precision fp32"):
        build_engine(bundle, target)


def test_height_500_is_refused(bundle: Bundle) -> None:
    ranges = replace(default_ranges(bundle), height=Range.fixed(501))
    with pytest.raises(InputError, match=r"height 501 is not a multiple of 4 pixels.*use 500 or 504"):
        build_engine(bundle, "onnxruntime", ranges=ranges)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not a bundle \(no bundle.json\)"):
        build_engine(tmp_path, "onnxruntime")


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _alter(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.onnx", _cut, r"unet/model.onnx has \d+ bytes instead of \d+ \(truncated or altered\).*sdkd export"),
        ("model.onnx.data", _alter, r"unet/model.onnx.data was altered: its SHA-256 differs.*sdkd export"),
        ("model.onnx.data", Path.unlink, r"unet/model.onnx.data is missing.*sdkd export"),
    ],
)
def test_a_damaged_onnx_file_is_refused(bundle: Bundle, name: str, damage: Any, message: str) -> None:
    damage(bundle.path / "unet" / name)
    with pytest.raises(BundleError, match=message):
        build_engine(bundle, "onnxruntime")
    assert not (bundle.path / "engines").exists()


def _cast_to_integer(bundle: Bundle) -> Bundle:
    """A UNet that every target reads but nobody's contract allows: its output is int64."""
    model = graph_model("unet", "fp32")
    model.graph.node[-1].output[0] = "float_sample"
    model.graph.node.append(helper.make_node("Cast", ["float_sample"], ["out_sample"], to=onnx.TensorProto.INT64))
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    return replace_component(bundle, "unet", model)


@pytest.mark.parametrize("target", RUNNABLE)
def test_a_graph_with_other_tensors_than_the_contract_is_refused(bundle: Bundle, target: str) -> None:
    _cast_to_integer(bundle)
    with pytest.raises(BuildError, match=r"unet for \w+: the graph's outputs are out_sample int64.*out_sample float32"):
        build_engine(bundle, target, components=["unet"])


def _not_a_number(bundle: Bundle) -> Bundle:
    model = graph_model("unet", "fp32")
    model.graph.node[-1].output[0] = "sum"
    model.graph.node.append(helper.make_node("Log", ["sum"], ["out_sample"]))
    return replace_component(bundle, "unet", model)


@pytest.mark.parametrize("target", RUNNABLE)
def test_nan_never_passes(bundle: Bundle, target: str) -> None:
    _not_a_number(bundle)
    before = _files(bundle)
    with pytest.raises(ValuesError, match=rf"the {target} engine of unet \(fp32\) gives NaN or infinity at 2x4x16x16"):
        build_engine(bundle, target)
    assert _files(bundle) == before


def _unknown_operator(bundle: Bundle) -> Bundle:
    model = graph_model("unet", "fp32")
    model.graph.node[0].op_type = "Convolve"
    return replace_component(bundle, "unet", model)


@pytest.mark.parametrize("target", RUNNABLE)
def test_a_failed_build_names_component_target_and_cause_and_keeps_the_rest(built: Bundle, target: str) -> None:
    _unknown_operator(built)
    before = _files(built)
    with pytest.raises(BuildError, match=rf"(?s)unet could not be built for {target}: .*Convolve.*Try this: update"):
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
    before = _files(built)
    main = threading.main_thread().ident
    assert main

    def interrupt(message: str, fraction: float | None) -> None:
        if message == "unet: compiling":
            signal.pthread_kill(main, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        build_engine(built, "openvino", progress=interrupt)
    assert _files(built) == before
    assert sorted(path.name for path in (built.path / "engines").iterdir()) == ["onnxruntime"]


def test_a_build_never_touches_the_files_of_the_manifest(built: Bundle) -> None:
    """Killed at any moment, a build leaves engines that match; who opened the bundle just before finds the new ones."""
    from engines.sessions.opening import open_session

    old = built.engine("onnxruntime", "unet")
    seen: list[str] = []

    def look(message: str, fraction: float | None) -> None:
        now = Bundle.open(built.path)
        now.verify_files(now.engine("onnxruntime", "unet"))
        seen.append(message)

    for _ in range(3):
        (built.path / "engines/onnxruntime/build-0123abcd").mkdir()
        (built.path / "engines/onnxruntime/build-0123abcd" / "unet.onnx").write_bytes(b"of a killed build")
        now = build_engine(built.path, "onnxruntime", components=["unet"], force=True, progress=look)
        record = now.engine("onnxruntime", "unet")
        now.verify_files(record)
        places = {file.relative_to(built.path).as_posix() for file in (built.path / "engines").rglob("unet.*")}
        assert places == {file.path for file in record.files}
        assert len(list((built.path / "engines/onnxruntime").glob("build-*"))) <= 1
    assert "unet: done" in seen
    assert old.files != record.files
    with open_session(built, "onnxruntime", "unet") as session:  # its manifest is three builds old
        assert session.checked.record == record


def test_a_manifest_that_cannot_be_written_leaves_the_old_engines(
    built: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _files(built)

    def full(self: Bundle) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Bundle, "save", full)
    with pytest.raises(BuildError, match="no space left for the engines"):
        build_engine(built, "onnxruntime", components=["unet"], force=True)
    assert _files(built) == before


def test_remains_of_a_killed_build_are_cleared(bundle: Bundle) -> None:
    left = bundle.path / "engines" / ".openvino.abc.partial"
    left.mkdir(parents=True)
    (left / "unet.blob").write_bytes(b"half")
    build_engine(bundle, "onnxruntime", components=["unet"])
    assert sorted(path.name for path in (bundle.path / "engines").iterdir()) == ["onnxruntime"]


class _Hidden(importlib.abc.MetaPathFinder):
    """An import system in which one package is not installed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> None:
        if fullname.partition(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


@pytest.mark.parametrize(
    ("module", "target", "precision"),
    [("openvino", "openvino", "fp32"), ("tensorrt_rtx", "tensorrt-rtx", "fp16"), ("tensorrt", "tensorrt", "fp16")],
)
def test_a_missing_extra_names_the_pip_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, target: str, precision: Any
) -> None:
    bundle = graph_bundle(tmp_path / "bundle", precision)
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Hidden(module), *sys.meta_path])
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


def test_jobs_cross_the_process_border_unchanged(bundle: Bundle) -> None:
    import json

    contract = bundle.component("unet").contract
    profile = ({"sample": [[1, 4, 16, 16], [2, 4, 16, 16], [8, 4, 16, 16]]},)
    job = Job("unet", "openvino", "fp32", "a", "b", contract, profile, ({"batch": 1},), {"config": {"A": "b"}})
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job


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


@pytest.mark.parametrize("external", [False, True])
def test_attention_of_a_float_graph_becomes_onnxruntime_s_own(tmp_path: Path, external: bool) -> None:
    bundle = bundle_copy(tmp_path / "bundle")
    if external:
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
