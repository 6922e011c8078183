"""T2I-Adapters and a timestep for each sample, exported on request: engines draw and predict what PyTorch does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionAdapterPipeline, StableDiffusionPipeline, T2IAdapter
from drawn import agree, differ, draw
from engine_bundles import RANGES
from helpers import fixed_weights
from made_once import made_once
from small_exports import small_bundle, small_pipeline

from engines import load_pipeline, plug
from export import build_engine, export_pipeline
from export.build.calibrate import check_recorded
from sdkd.bundle.manifest import Bundle
from sdkd.errors import BundleError, EngineError, ModelError
from sdkd.models.families import new_pipeline

IMAGE = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(3))


def adapted() -> StableDiffusionAdapterPipeline:
    """The small pipeline with a T2I-Adapter."""
    adapter = T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")
    parts = small_pipeline().components | {"adapter": fixed_weights(adapter, 7)}
    return new_pipeline(StableDiffusionAdapterPipeline, parts, {"requires_safety_checker": False})


@pytest.fixture(scope="module")
def bundle() -> Path:
    """Its bundle with engines of ONNX Runtime; read it, do not change it."""

    def make(path: Path) -> None:
        export_pipeline(adapted(), path, timesteps=True, reuse=[small_bundle().path])
        build_engine(path, "onnxruntime", ranges=RANGES)

    return made_once("t2i-adapter", make)


def test_a_t2i_adapter_beside_engines(bundle: Path) -> None:
    pipe, eager = adapted(), adapted()
    plug(pipe, bundle, "onnxruntime")
    assert isinstance(pipe.adapter, T2IAdapter)
    options: dict[str, Any] = {"image": IMAGE, "height": 32, "width": 32, "adapter_conditioning_scale": 0.8}
    expected = draw(eager, **options)
    agree(draw(pipe, **options), expected)
    differ(draw(pipe, **options | {"adapter_conditioning_scale": 0.0}), expected)


def test_without_an_adapter_the_unet_is_the_plain_one(bundle: Path) -> None:
    pipe = load_pipeline(bundle, "onnxruntime")
    assert type(pipe) is StableDiffusionPipeline
    agree(draw(pipe), draw(small_pipeline()))


def test_each_sample_has_its_own_timestep(bundle: Path) -> None:
    unet, eager = load_pipeline(bundle, "onnxruntime").unet, small_pipeline().unet
    generator = torch.Generator().manual_seed(1)
    sample, text = torch.randn(3, 4, 16, 16, generator=generator), torch.randn(3, 77, 32, generator=generator)
    times = torch.tensor([999, 500, 1])
    torch.testing.assert_close(
        unet(sample, times, text).sample, eager(sample, times, text).sample, atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(unet(sample, 7, text).sample, eager(sample, 7, text).sample, atol=1e-4, rtol=1e-4)


def test_bundles_and_adapters_that_do_not_fit(bundle: Path, engine_bundle: Path) -> None:
    with pytest.raises(ModelError, match=r"no inputs for this StableDiffusionAdapterPipeline's T2I-.*--t2i-adapter"):
        plug(adapted(), engine_bundle, "onnxruntime")
    unet = load_pipeline(bundle, "onnxruntime").unet
    call = (torch.zeros(1, 4, 16, 16), 5, torch.zeros(1, 77, 32))
    with pytest.raises(EngineError, match=r"takes 2 residuals of a T2I-Adapter, not 3: .* not a student with fewer"):
        unet(*call, down_intrablock_additional_residuals=[torch.zeros(1, 16, 16, 16)] * 3)
    plain = load_pipeline(engine_bundle, "onnxruntime").unet
    with pytest.raises(EngineError, match=r"cannot take down_intrablock_additional_residuals: .* with --t2i-adapter"):
        plain(*call, down_intrablock_additional_residuals=[torch.zeros(1, 16, 16, 16)])
    with pytest.raises(BundleError, match=r"takes residuals of a T2I-Adapter, which no calibration has"):
        check_recorded(Bundle.open(bundle))
