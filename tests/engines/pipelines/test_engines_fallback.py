"""What the engines were not built for, run eagerly when asked for: the same images, announced once."""

from __future__ import annotations

import gc
import logging
import weakref
from pathlib import Path

import numpy as np
import pytest
import small_bundles
import small_exports
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from drawn import agree, differ, draw
from PIL import Image

from engines import plug, swap_weights, unplug
from engines.modules.base import EngineModule
from sdkd.bundle.manifest import Bundle
from sdkd.errors import EngineError, RangeError


@pytest.fixture
def pipe(engine_bundle: Path, eager: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """Engines for 32 to 64 pixels and 77 tokens, with the eager modules behind them."""
    return plug(eager, engine_bundle, "onnxruntime", eager_fallback=True)


def test_a_size_outside_the_profile_runs_eagerly(
    pipe: StableDiffusionPipeline, engine_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = draw(small_bundles.small_pipeline(), height=96, width=64)
    with caplog.at_level(logging.WARNING, logger="engines"):
        for _ in range(2):
            agree(draw(pipe, height=96, width=64), expected)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2, said  # the UNet once and the VAE once, whatever the number of steps and calls
    assert said[0].startswith("EngineUNet: runs eagerly, as eager_fallback asks, since ")
    assert "was asked for batch 1 (2 with guidance), height 96 px, width 64 px" in said[0]
    assert f"sdkd build-engine {engine_bundle}" in said[0]
    assert said[1].startswith("EngineVAE: runs eagerly")


def test_sizes_inside_the_profile_run_on_the_engine(
    pipe: StableDiffusionPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    before = draw(pipe, height=64, width=64)
    for parameter in pipe.unet.original.parameters():
        parameter.data.mul_(2)
    assert np.array_equal(draw(pipe, height=64, width=64), before)
    assert not caplog.records


def test_the_engines_weights_count_for_the_eager_module(engine_bundle: Path) -> None:
    pipe, changed = (small_exports.small_pipeline() for _ in range(2))
    plug(pipe, engine_bundle, "onnxruntime", eager_fallback=True)
    plain = draw(pipe, height=96, width=64)
    state = {name: tensor * 1.1 for name, tensor in changed.unet.state_dict().items()}
    changed.unet.load_state_dict(state)
    expected = draw(changed, height=96, width=64)
    differ(expected, plain)
    swap_weights(pipe, state)
    agree(draw(pipe, height=96, width=64), expected)
    swap_weights(pipe, None)
    assert np.array_equal(draw(pipe, height=96, width=64), plain)


def test_a_bundle_without_an_encoder_engine_encodes_eagerly(
    bundle_copy: Path, eager: StableDiffusionPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = Bundle.open(bundle_copy)
    del bundle.manifest.engines["onnxruntime/vae_encoder"]  # type: ignore[attr-defined]
    bundle.save()
    plug(eager, bundle_copy, "onnxruntime", eager_fallback=True)
    caplog.clear()
    image = Image.fromarray(np.full((32, 32, 3), 90, np.uint8))
    pipe = StableDiffusionImg2ImgPipeline(**eager.components, requires_safety_checker=False)
    assert draw(pipe, image=image, strength=1.0).shape == (1, 32, 32, 3)
    assert ["no vae_encoder engine" in record.getMessage() for record in caplog.records] == [True]


def test_longer_prompts_than_the_text_encoders_engine_takes_run_eagerly(pipe: StableDiffusionPipeline) -> None:
    ids = torch.zeros(1, 40, dtype=torch.long)
    expected = pipe.text_encoder.original(ids).last_hidden_state
    assert torch.equal(pipe.text_encoder(ids).last_hidden_state, expected)


def test_without_the_wish_a_size_outside_is_an_error(engine_bundle: Path, eager: StableDiffusionPipeline) -> None:
    plug(eager, engine_bundle, "onnxruntime", keep_eager=True)
    with pytest.raises(RangeError, match=r"height 96 px, width 64 px"):
        draw(eager, height=96, width=64)
    unplug(eager)
    assert not isinstance(eager.unet, EngineModule)


def test_the_eager_modules_are_let_go(engine_bundle: Path) -> None:
    pipe = small_exports.small_pipeline()
    kept = [weakref.ref(getattr(pipe, name)) for name in ("unet", "vae", "text_encoder")]
    plug(pipe, engine_bundle, "onnxruntime", components=("unet", "vae"))
    gc.collect()
    assert [reference() is None for reference in kept] == [True, True, False]
    with pytest.raises(EngineError, match=r"has no eager modules, since .*plugged without keep_eager=True"):
        unplug(pipe)
