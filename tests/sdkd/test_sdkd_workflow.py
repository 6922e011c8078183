"""What `prepare` exports for a target, and engines that are built again from other weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_exports import bundle_copy, half_bundle, small_pipeline

from engines.sessions.opening import open_session
from export import build_engine
from export.build import engines as build
from export.graph import to_onnx
from sdkd.bundle.manifest import Bundle
from sdkd.bundle.onnx_weights import exported_weights, stored_weights
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.targets.plan import plan_for_model
from sdkd.workflow import SWAPPED, content_key, prepare, rebuild


def test_the_export_is_one_that_the_target_s_library_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_pipeline().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(build, "build_engine", lambda *_, **__: None)  # of another test
    exported, plan = [], plan_for_model("onnxruntime")
    for old in (False, True, True, False):  # a library without attention of its own parses no later opset than 18
        monkeypatch.setattr(to_onnx, "_is_old", lambda target, old=old: old and target == "onnxruntime")
        made = prepare(tmp_path / "model", plan, tmp_path / "work", components=("text_encoder",))
        exported.append((Bundle.open(made.bundle).component("text_encoder").opset, made.exported))
    assert exported == [(23, True), (18, True), (18, False), (18, False)]


ONE = ShapeRanges(Range(1, 1, 2), Range.fixed(32), Range.fixed(32), Range.fixed(77))
NAMES = ("conv_out.weight", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight")


def other_weights(bundle: Bundle, factor: float) -> dict[str, np.ndarray]:
    """Two weights, one of them stored transposed, times a factor."""
    state = small_pipeline().unet.state_dict()
    file = bundle.path / "unet" / "model.onnx"
    return stored_weights(file, {name: state[name].numpy() * factor for name in NAMES})


def test_a_rebuilt_engine_computes_with_the_other_weights(tmp_path: Path) -> None:
    bundle = build_engine(bundle_copy(tmp_path / "bundle"), "onnxruntime", ranges=ONE, components=("unet",))
    record = bundle.engine("onnxruntime", "unet")
    again = rebuild(bundle, record, other_weights(bundle, 0.5))
    unet = small_pipeline().unet
    for name in NAMES:
        unet.get_parameter(name).data *= 0.5
    generator = torch.Generator().manual_seed(0)
    feeds = {
        "sample": torch.randn(2, 4, 16, 16, generator=generator),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": torch.randn(2, 77, 32, generator=generator),
    }
    with open_session(again, "onnxruntime", "unet") as session, torch.no_grad():
        found = session.run(feeds)["out_sample"]
        torch.testing.assert_close(found, unet(*feeds.values()).sample, atol=1e-4, rtol=1e-4)
    assert not list((again.path / "unet").glob("model.onnx*"))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A TensorRT-RTX engine of the UNet in fp16."""
    folder = shutil.copytree(half_bundle().path, tmp_path_factory.mktemp("rebuild") / "bundle")
    return build_engine(Path(folder), "tensorrt-rtx", ranges=ONE, components=("unet",))


def test_rebuilt_engines_are_kept_by_content(half: Bundle) -> None:
    record = half.engine("tensorrt-rtx", "unet")
    weights = other_weights(half, 0.5)
    first = rebuild(half, record, weights)
    assert first.path == half.path / SWAPPED / content_key(record, weights)
    engine = first.engine("tensorrt-rtx", "unet")
    assert engine.files[0].sha256 != record.files[0].sha256
    assert (engine.ranges, engine.precision) == (record.ranges, record.precision)
    assert engine.flags["strongly_typed"] == record.flags["strongly_typed"]
    written = (first.path / engine.files[0].path).stat().st_mtime_ns
    assert (rebuild(half, record, weights).path / engine.files[0].path).stat().st_mtime_ns == written
    assert content_key(record, other_weights(half, 0.25)) != content_key(record, weights)


def test_the_same_weights_give_the_same_graph(half: Bundle) -> None:
    file = half.path / "unet" / "model.onnx"
    same = other_weights(half, 1.0)
    for name, array in exported_weights(file, same).items():
        np.testing.assert_array_equal(array, same[name])
    assert same[NAMES[1]].dtype == np.float16
