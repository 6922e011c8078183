"""OpenVINO models compiled for the few shapes of their calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_bundles import graph_unet, reference, unet_feeds
from small_exports import small_bundle

from engines.sessions.opening import open_session
from sdkd.bundle.onnx_weights import torch_weights
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.targets.openvino_shapes import ByShape, corners
from sdkd.targets.openvino_timesteps import keep_timesteps
from sdkd.targets.registry import cpu_precisions, openvino_core

pytest.importorskip("openvino")

SIDE = Range.fixed(32)


def fixed(images: int) -> ShapeRanges:
    return ShapeRanges(Range.fixed(images), SIDE, SIDE, Range.fixed(77))


@pytest.mark.parametrize(
    ("least", "most", "few"),
    [
        ((1, 4, 64, 64), (2, 4, 64, 64), True),  # one image, with guidance and without
        ((4, 4, 64, 96), (8, 4, 64, 96), True),
        ((1, 8, 64, 64), (3, 8, 64, 64), True),  # instruct-pix2pix
        ((1, 4, 64, 64), (8, 4, 64, 64), False),  # one to four images
        ((1, 4, 64, 64), (2, 4, 64, 96), False),  # sizes vary
        ((2, 4, 64, 64), (2, 4, 64, 64), False),  # one shape: nothing to choose
    ],
)
def test_only_guidance_may_be_between_the_corners(least: tuple[int, ...], most: tuple[int, ...], few: bool) -> None:
    profile = {"sample": [least, most, most], "timestep": [(), (), ()]}
    found = corners(profile)
    assert found == (({"sample": least, "timestep": ()}, {"sample": most, "timestep": ()}) if few else ())


def test_each_corner_is_compiled_at_its_first_call_and_all_other_shapes_together() -> None:
    made: list[Any] = []

    class Compiled:
        def create_infer_request(self) -> int:
            return len(made)

    def build(corner: Any) -> Compiled:
        made.append(corner)
        return Compiled()

    low, high = {"x": (2, 3)}, {"x": (4, 3)}
    models = ByShape((low, high), build)
    assert models.usual() is models.of({"x": torch.Size((4, 3))})[0]
    assert made == [high]
    assert [models.of({"x": shape})[1] for shape in ((2, 3), (3, 3), (3, 3), (2, 3))] == [2, 3, 3, 2]
    assert made == [high, low, None]
    whole = ByShape((), build)
    assert whole.usual() is whole.of({"x": (9, 9)})[0]


@pytest.mark.parametrize("images", [1, 2])
def test_an_engine_for_one_size_runs_every_batch_that_it_was_built_for(tmp_path: Path, images: int) -> None:
    bundle = graph_unet(tmp_path / "bundle", "fp32", ("openvino",), fixed(images))
    record = bundle.engine("openvino", "unet")
    assert record.flags["format"] == "ir"
    assert [Path(file.path).name for file in record.files] == ["unet.xml", "unet.bin"]
    with open_session(bundle, "openvino", "unet") as session:
        for batch in range(images, 2 * images + 1):  # a batch of 3 is neither corner
            feeds = unet_feeds(batch=batch)
            found = session.run(feeds)["out_sample"]
            torch.testing.assert_close(found, reference(bundle, "unet", feeds), rtol=1e-4, atol=1e-4)


def test_weights_that_are_swapped_in_count_for_every_shape(tmp_path: Path) -> None:
    bundle = graph_unet(tmp_path / "bundle", "fp32", ("openvino",), fixed(1))
    conv = torch_weights(bundle.path / "unet/model.onnx")["conv"]
    with open_session(bundle, "openvino", "unet") as session:
        before = {batch: session.run(unet_feeds(batch=batch))["out_sample"] for batch in (1, 2)}
        session.swap({"conv": torch.zeros_like(conv)})
        swapped = {batch: session.run(unet_feeds(batch=batch))["out_sample"] for batch in (1, 2)}
        session.swap({})
        after = {batch: session.run(unet_feeds(batch=batch))["out_sample"] for batch in (1, 2)}
    for batch in (1, 2):
        assert not torch.equal(swapped[batch], before[batch])
        assert torch.equal(after[batch], before[batch])


@pytest.mark.skipif("bf16" not in cpu_precisions(), reason="this CPU has no bf16 units")
def test_an_ir_keeps_timesteps_in_float32(tmp_path: Path) -> None:
    import openvino

    core, hint = openvino_core(), {"INFERENCE_PRECISION_HINT": "bf16"}
    model = core.read_model(small_bundle().path / "unet" / "model.onnx")
    assert keep_timesteps(core, model) == 2
    openvino.save_model(model, tmp_path / "unet.xml", compress_to_fp16=False)
    generator = np.random.default_rng(7)
    feeds = {
        "sample": generator.standard_normal((2, 4, 16, 16)).astype(np.float32),
        "timestep": np.array(981.0, np.float32),
        "encoder_hidden_states": generator.standard_normal((2, 77, 32)).astype(np.float32),
    }
    direct, saved = (core.compile_model(one, "CPU", hint) for one in (model, core.read_model(tmp_path / "unet.xml")))
    plain = core.compile_model(core.read_model(small_bundle().path / "unet" / "model.onnx"), "CPU", hint)
    found = [np.array(compiled(dict(feeds))["out_sample"]) for compiled in (direct, saved, plain)]
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])
