"""Engines beyond text-to-image: ControlNet, clip_skip, AutoencoderTiny, instruct-pix2pix, prompts of several parts.

Every case is drawn by the eager pipeline and by engines of it, from the same latents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline, StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline
from drawn import agree, draw
from engine_bundles import variant_engines
from PIL import Image
from small_bundles import small_pipeline
from small_exports import variant_pipeline, with_controlnet

from engines import load_pipeline, plug, unplug
from engines.modules.components import EngineControlNet
from sdkd.core.profiles import Range
from sdkd.errors import EngineError, ModelError


def picture(size: int = 32, seed: int = 0) -> Image.Image:
    """Smooth colours."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def controlled() -> StableDiffusionControlNetPipeline:
    """The small pipeline with a ControlNet."""
    return with_controlnet(small_pipeline())


@pytest.mark.parametrize(
    ("target", "call"), [("openvino", {"controlnet_conditioning_scale": 0.3}), ("onnxruntime", {"guess_mode": True})]
)
def test_a_controlnet_pipeline_on_engines(control_bundle: Path, target: str, call: dict[str, Any]) -> None:
    expected = draw(controlled(), image=picture(), **call)
    loaded = load_pipeline(control_bundle, target)
    assert type(loaded) is StableDiffusionControlNetPipeline
    agree(draw(loaded, image=picture(), **call), expected)


def test_the_controlnet_is_plugged_and_unplugged_too(control_bundle: Path, engine_bundle: Path) -> None:
    pipe = controlled()
    expected, original = draw(pipe, image=picture()), pipe.controlnet
    plug(pipe, control_bundle, "onnxruntime", keep_eager=True)
    assert type(pipe.controlnet) is EngineControlNet
    agree(draw(pipe, image=picture()), expected)
    unplug(pipe)
    assert pipe.controlnet is original
    plug(pipe, control_bundle, "onnxruntime", components=("unet",))  # beside an eager ControlNet
    agree(draw(pipe, image=picture()), expected)
    with pytest.raises(ModelError, match=r"has no inputs for this StableDiffusionControlNet.*--controlnet FOLDER"):
        plug(controlled(), engine_bundle, "onnxruntime")


def test_without_residuals_the_unet_is_the_plain_one(control_bundle: Path) -> None:
    pipe = load_pipeline(control_bundle, "onnxruntime", controlnet=False)
    assert type(pipe) is StableDiffusionPipeline
    agree(draw(pipe), draw(small_pipeline()))


def test_residuals_of_another_unet_are_counted(control_bundle: Path) -> None:
    unet = load_pipeline(control_bundle, "onnxruntime", controlnet=False).unet
    inputs, down = (torch.zeros(1, 4, 16, 16), 5, torch.zeros(1, 77, 32)), [torch.zeros(1)] * 2
    with pytest.raises(EngineError, match=r"takes 5 residuals.*not 3: a ControlNet fits the UNet"):
        unet(*inputs, down_block_additional_residuals=down, mid_block_additional_residual=torch.zeros(1))


def test_clip_skip_takes_an_earlier_layer(control_bundle: Path) -> None:
    eager = small_pipeline()
    ids = eager.tokenizer("a cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
    hidden = eager.text_encoder(ids, output_hidden_states=True).hidden_states
    norm = getattr(eager.text_encoder, "text_model", eager.text_encoder).final_layer_norm
    pipe = load_pipeline(control_bundle, "onnxruntime", controlnet=False)
    for skip in (1, 2):
        found, _ = pipe.encode_prompt("a cat", "cpu", 1, False, clip_skip=skip)
        torch.testing.assert_close(found, norm(hidden[-(skip + 1)]), atol=1e-4, rtol=1e-4)


def test_a_tiny_autoencoder_decodes_and_encodes() -> None:
    bundle, eager = variant_engines("taesd", ["onnxruntime"]), variant_pipeline("taesd")
    expected = draw(eager)
    pipe = load_pipeline(bundle, "onnxruntime")
    assert pipe.vae.config.scaling_factor == 1.0
    agree(draw(pipe), expected)
    agree(draw(plug(small_pipeline(), bundle, "onnxruntime", check_weights="none")), expected)
    image = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pipe.vae.encode(image).latents, eager.vae.encode(image).latents, atol=1e-4, rtol=1e-4)


def test_instruct_pix2pix_guides_with_three_copies() -> None:
    expected = draw(variant_pipeline("pix2pix"), image=picture(), image_guidance_scale=1.5)
    loaded = load_pipeline(variant_engines("pix2pix", ["onnxruntime"]), "onnxruntime")
    assert type(loaded) is StableDiffusionInstructPix2PixPipeline
    assert loaded.unet.session.limits["batch"] == Range(1, 3, 6)
    agree(draw(loaded, image=picture(), image_guidance_scale=1.5), expected)
