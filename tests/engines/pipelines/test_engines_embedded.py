"""UNets that take the guidance scale as an embedding (LCM): calls, pipelines, `sdkd generate`, what is refused.

Every case is drawn by the eager pipeline and by engines of it, from the same latents.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from drawn import agree, differ, draw
from engine_bundles import RANGES, unet_feeds
from generate_runs import pixels, run
from made_once import made_once
from PIL import Image
from small_bundles import small_pipeline
from small_exports import ONE_LEVEL, embedded_pipeline, variant_bundle
from small_exports import small_pipeline as own_pipeline

from engines import load_pipeline, plug, swap_weights
from engines.generate.image_inputs import Inputs, find_kind
from export import build_engine, export_pipeline
from sdkd.core.profiles import Range
from sdkd.errors import EngineError, InputError, ModelError

LCM: Any = LatentConsistencyModelPipeline
PICTURE = Image.linear_gradient("L").resize((32, 32)).convert("RGB")


def _build(folder: Path) -> None:
    shutil.copytree(variant_bundle("embedded"), folder)
    build_engine(folder, "onnxruntime", ranges=RANGES)
    build_engine(folder, "openvino", ranges=RANGES, components=("unet",))


@pytest.fixture(scope="module")
def bundle() -> Path:
    """Engines of every component on ONNX Runtime, of the UNet on OpenVINO: 32 to 64 px, up to 2 images."""
    return made_once("embedded-engines", _build)


@pytest.fixture(scope="module")
def eager() -> LatentConsistencyModelPipeline:
    """Read it, do not change it."""
    return embedded_pipeline()


def embedding(pipe: Any, *scales: float) -> torch.Tensor:
    found: torch.Tensor = pipe.get_guidance_scale_embedding(torch.tensor(scales), embedding_dim=8)
    return found


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_plugged_pipeline_draws_what_the_eager_one_does(bundle: Path, target: str) -> None:
    eager, pipe = embedded_pipeline(), plug(embedded_pipeline(), bundle, target, ["unet"])
    assert pipe.unet.session.limits["batch"] == Range(1, 1, 2)  # guidance stacks nothing
    weak, strong = (draw(eager, guidance_scale=scale, num_images_per_prompt=3) for scale in (1.0, 9.0))
    differ(weak, strong)
    agree(draw(pipe, guidance_scale=1.0, num_images_per_prompt=3), weak)
    agree(draw(pipe, guidance_scale=9.0, num_images_per_prompt=3), strong)


def test_a_bundle_is_loaded_as_what_it_was_made_from(bundle: Path, eager: Any) -> None:
    pipe = load_pipeline(bundle, "onnxruntime", low_memory=True)
    assert type(pipe) is LCM
    expected = draw(eager)
    agree(draw(pipe), expected)
    for kind, call in (
        (StableDiffusionPipeline, {"negative_prompt": "a dog"}),  # not read: nothing is stacked
        (StableDiffusionImg2ImgPipeline, {"image": PICTURE, "strength": 0.5}),
        (LatentConsistencyModelImg2ImgPipeline, {"image": PICTURE, "strength": 0.5}),
    ):
        one, other = (kind(**each.components, requires_safety_checker=False) for each in (pipe, eager))
        agree(draw(one, **call), draw(other, **call))
    assert np.array_equal(draw(StableDiffusionPipeline(**eager.components, requires_safety_checker=False)), expected)


def test_one_call_equals_eager_with_and_without_an_embedding(bundle: Path, eager: Any) -> None:
    unet = load_pipeline(bundle, "onnxruntime").unet
    for batch in (1, 2, 3):
        sample, timestep, text = unet_feeds(batch=batch).values()
        for given in (None, embedding(eager, 0.0), embedding(eager, *(7.0, 0.5, 2.0)[:batch])):
            expected = eager.unet(sample, timestep, text, timestep_cond=given).sample
            found = unet(sample, timestep, text, timestep_cond=given).sample
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    half = unet(sample.bfloat16(), timestep, text.bfloat16(), timestep_cond=given.bfloat16()).sample
    torch.testing.assert_close(half.float(), expected, atol=0.1, rtol=0)
    for wrong in (torch.zeros(3, 256), torch.zeros(2, 8), torch.zeros(8)):
        shape = str(tuple(wrong.shape)).replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(EngineError, match=rf"timestep_cond of shape \(3, 8\), .*, not {shape}: make it with the"):
            unet(sample, timestep, text, timestep_cond=wrong)


def test_the_embedding_reaches_the_eager_fallback_and_other_weights(bundle: Path, eager: Any) -> None:
    pipe, changed = plug(embedded_pipeline(), bundle, "onnxruntime", eager_fallback=True), embedded_pipeline()
    agree(draw(pipe, height=96, width=64), draw(eager, height=96, width=64))
    changed.unet.time_embedding.cond_proj.weight.data.mul_(-3)
    differ(draw(changed), draw(eager))
    swap_weights(pipe, changed.unet.state_dict())
    agree(draw(pipe), draw(changed))


def test_generate_draws_what_lcms_pipeline_draws(bundle: Path, eager: Any, tmp_path: Path) -> None:
    eager.save_pretrained(tmp_path / "model")
    PICTURE.save(tmp_path / "image.png")
    settings = ("-o", tmp_path / "out.png", "--steps", 4, "--seed", 3, "--guidance-scale", 8.5)
    call = {"num_inference_steps": 4, "guidance_scale": 8.5}
    images = StableDiffusionImg2ImgPipeline(**eager.components, requires_safety_checker=False)
    for pipe, words, more in (
        (eager, (), {}),
        (images, ("--image", tmp_path / "image.png"), {"image": PICTURE, "strength": 0.8}),
    ):
        drawn = pipe("a cat", generator=torch.Generator().manual_seed(3), **call, **more).images[0]
        for model, within in ((tmp_path / "model", 0), (bundle, 1)):
            result = run(model, "a cat", *settings, *words, "--overwrite")
            assert result.exit_code == 0, result.exception
            assert np.abs(pixels(tmp_path / "out.png") - np.asarray(drawn, float)).max() <= within
    result = run(bundle, "a cat", *settings, "--negative-prompt", "a dog", "--overwrite")
    with pytest.raises(
        InputError, match=r"takes its guidance scale as an embedding .*leave out --negative-prompt 'a d"
    ):
        raise result.exception
    both = Inputs(files={"image": tmp_path, "control": tmp_path})
    with pytest.raises(InputError, match=r"StableDiffusionControlNetImg2ImgPipeline gives it none: give --image or --"):
        find_kind("model", eager.unet.config, both)


def test_lcms_pipeline_needs_a_unet_with_an_embedding(
    bundle: Path, engine_bundle: Path, eager: Any, tmp_path: Path
) -> None:
    plain = LCM(**small_pipeline().components, requires_safety_checker=False)
    plain.save_pretrained(tmp_path / "model")
    why = r"a LatentConsistencyModelPipeline, which gives .* takes none .*: make it a StableDiffusionPipeline, with LCM"
    with pytest.raises(ModelError, match=rf"this pipeline is {why}"):
        plug(plain, engine_bundle, "onnxruntime")
    with pytest.raises(ModelError, match=rf"the pipeline is {why}"):
        export_pipeline(plain, tmp_path / "bundle")
    with pytest.raises(ModelError, match=rf"folder '.*model' is {why}"):
        export_pipeline(tmp_path / "model", tmp_path / "bundle")
    with pytest.raises(ModelError, match=r"time_embedding\.cond_proj\.weight is in the bundle alone"):
        plug(own_pipeline(**ONE_LEVEL), bundle, "onnxruntime", ["unet"])
