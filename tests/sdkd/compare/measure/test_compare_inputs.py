"""Models that look at images, compared: ControlNet, inpainting, instruct-pix2pix, and a bundle with another VAE."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionInpaintPipeline, UNet2DConditionModel
from diffusers import StableDiffusionInstructPix2PixPipeline as Pix2Pix
from helpers import CROSS, UP, fixed_weights
from small_bundles import UNET, VAE, small_controlnet, small_pipeline
from small_exports import embedded_pipeline, small_bundle

from engines.generate.image_inputs import EDIT, PIPELINE_KINDS, TEXT
from export import build_engine, export_pipeline
from sdkd.compare import compare
from sdkd.compare.measure.calls import Request, make_images, picture, step_work
from sdkd.compare.measure.defaults import default_judge
from sdkd.compare.measure.planning import Wish, make_plan
from sdkd.compare.measure.results import Report
from sdkd.compare.measure.subjects import Subject, open_subject
from sdkd.compare.report.words import sentence
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.errors import EngineError, ModelError
from sdkd.evaluate.agreement import draw_images
from sdkd.models.generation import Generation

PROMPTS = ("a cat", "a dog")
# One level, which exports in half the time of two.
LEVEL: dict[str, Any] = {
    "down_block_types": (CROSS,), "up_block_types": (UP,), "block_out_channels": (16,), "attention_head_dim": 1,
}  # fmt: skip
RANGES = ShapeRanges(Range(1, 1, 2), Range.fixed(32), Range.fixed(32), Range.fixed(77))


def model(folder: Path, channels: int, **others: Any) -> Path:
    """The small pipeline in its folder, with a UNet of so many input channels, and other parts."""
    parts: dict[str, Any] = small_pipeline().components
    unet = fixed_weights(UNet2DConditionModel(**UNET | LEVEL | {"in_channels": channels}), 3)
    kind = {9: StableDiffusionInpaintPipeline, 8: Pix2Pix}.get(channels, type(small_pipeline()))
    taken = {name: value for name, value in parts.items() if name != "image_encoder" or channels != 8}
    pipe = kind(**taken | {"unet": unet} | others, requires_safety_checker=False)
    pipe.save_pretrained(folder)
    return folder


def measured(model: Path, targets: tuple[str, ...] | None = None, size: tuple[int, int] | None = None) -> Report:
    """A model or bundle on targets, in this process."""
    plan = make_plan([str(model)], Wish(targets, None, None, model.parent / "others"))
    few = {"steps": 2, "runs": 1, "min_seconds": 0, "image_runs": 1}
    return compare(plan.subjects, prompts=PROMPTS, size=size, notes=plan.notes, **few)


@pytest.mark.parametrize(
    ("channels", "copies", "words"), [(9, 2, "a drawn picture and a mask"), (8, 3, "a drawn picture, ")]
)
def test_models_that_look_at_images_run_eagerly(tmp_path: Path, channels: int, copies: int, words: str) -> None:
    report = measured(model(tmp_path / "model", channels), ("eager", "eager-bf16"), (32, 48))
    assert [row.subject.target for row in report.results] == ["eager", "eager"]
    assert (report.results[0].unet_batch, report.setup.size) == (copies, (32, 48))
    assert {image.size for row in report.images.values() for image in row} == {(48, 32)}
    assert "48 × 32 px" in sentence(report)
    assert f"model was given {words}" in report.notes[0]


def test_a_unet_that_takes_its_guidance_scale_sees_one_latent_an_image(tmp_path: Path) -> None:
    pipe = embedded_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    report = measured(tmp_path / "model", ("eager",))
    assert (report.results[0].unet_batch, len(report.results)) == (1, 1)
    opened = open_subject(Subject("embedded", tmp_path / "model", run=Generation(2, 1.0, "DDIMScheduler")))
    weak, strong = (make_images(opened, Request(PROMPTS, 0, 32, run=Generation(2, scale)), 0) for scale in (1.0, 9.0))
    assert np.abs(np.asarray(weak[0], float) - np.asarray(strong[0], float)).max() > 2
    found = [step_work(opened, Request(PROMPTS, 0, 32, run=Generation(2, scale), copies=1))() for scale in (1.0, 9.0)]
    assert found[0].shape == (1, 4, 16, 16)
    assert not torch.allclose(*found, atol=1e-3)


def test_a_bundle_with_other_parts_is_compared_with_the_eager_model_that_has_them(tmp_path: Path) -> None:
    one = {name: value for name, value in LEVEL.items() if name != "up_block_types"}
    small_controlnet(**one).save_pretrained(tmp_path / "controlnet")
    small_pipeline().vae.save_pretrained(tmp_path / "vae")
    others = {"controlnet": tmp_path / "controlnet", "vae": tmp_path / "vae", "reuse": [small_bundle().path]}
    own = fixed_weights(AutoencoderKL(**VAE), 9)
    bundle = export_pipeline(model(tmp_path / "model", 9, vae=own), tmp_path / "bundle", verify=False, **others)
    report = measured(build_engine(bundle, "onnxruntime", ranges=RANGES).path)
    eager, engine = report.results
    assert (eager.subject.target, engine.subject.target) == ("eager", "onnxruntime")
    assert engine.against_eager is not None
    assert engine.against_eager.psnr_min_db > 60
    assert engine.verdict is not None
    assert engine.verdict.ok
    assert "a drawn picture and a mask and the outline of a disc for its ControlNet" in report.notes[0]
    plain = open_subject(Subject("plain", tmp_path / "model"))
    bare = make_images(plain, Request(PROMPTS, 0, 32, run=Generation(2, 7.5)), 0)
    assert np.abs(np.asarray(bare[0], float) - np.asarray(report.images[eager.subject.label][0], float)).max() > 20
    assert default_judge([str(bundle.path)], ["a large red star on a white background"], (64, 64)) is None

    (tmp_path / "vae" / "config.json").unlink()
    plan = make_plan([str(bundle.path)], Wish(None, None, None, tmp_path / "others"))
    assert [subject.target for subject in plan.subjects] == ["onnxruntime"]
    assert "no eager baseline (vae" in plan.notes[0]
    with pytest.raises(ModelError, match=r"vae .*config\.json' does not exist: give the folder"):
        open_subject(Subject("gone", tmp_path / "model", replaced=(("vae", str(tmp_path / "vae")),)))


def test_pixels_that_are_not_finite_are_no_black_pictures() -> None:
    pipe = copy.deepcopy(small_pipeline())
    pipe.vae.post_quant_conv.weight.data.fill_(float("nan"))
    with pytest.raises(EngineError, match=r"images of prompt 1: pixels are not finite"):
        make_images(pipe, Request(PROMPTS, 0, 32, run=Generation(1, 1.0)), 0)
    with pytest.raises(EngineError, match=r"image 1 of 2: pixels are not finite"):
        draw_images(pipe, PROMPTS, Generation(1, 1.0), seed=0)


def test_drawn_inputs_fit_every_pipeline() -> None:
    known = {name for kind in (*PIPELINE_KINDS.values(), EDIT, TEXT) for name in kind.images.values()}
    assert known == {"image", "mask", "control"}
    for size in ((8, 8), (32, 48), (100, 60)):
        assert [picture(name, size).size for name in known] == [size[::-1]] * 3
    assert np.asarray(picture("mask", (32, 32))).mean() == 255 / 4
    assert np.asarray(picture("image", (32, 32)))[16, 16].tolist() == [220, 40, 40]
    outline = np.asarray(picture("control", (32, 32)))
    assert (outline[16, 16].tolist(), outline.max()) == ([0, 0, 0], 255)
