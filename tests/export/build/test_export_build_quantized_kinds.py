"""Eight bits for every kind of model by the same code: inpainting, image editing, few steps, LoRA."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import kohya
from quantized_builds import CPU_TARGETS, rounded_bundle
from safetensors.torch import save_file
from small_exports import small_pipeline, variant_bundle

from engines import load_pipeline
from export import build_engine
from export.build.calibrate import CalibrationWish, calibration_file
from sdkd.bundle.quantized import Quantized
from sdkd.models.bundle_modules import pipeline_of
from sdkd.quantization.calibration import Calibration

LAYERS = ("conv1", "to_q", "to_out.0")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "channels"), [("inpaint", 9), ("pix2pix", 8), ("embedded", 4)])
def test_other_kinds_of_models(name: str, channels: int, tmp_path: Path) -> None:
    shutil.copytree(variant_bundle(name), tmp_path / "bundle")
    wish = CalibrationWish(prompts=("a red star",), images=2, steps=2)
    bundle = build_engine(tmp_path / "bundle", "onnxruntime", precision="int8", calibration=wish, keep_slower=True)
    calls = Calibration.load(calibration_file(bundle.path)).calls
    assert {call.sample.shape[1] for call in calls} == {channels}
    assert {tuple(call.extra) for call in calls} == {("timestep_cond",) if name == "embedded" else ()}
    found = Quantized.of(bundle.engine("onnxruntime-int8", "unet").flags)
    assert found is not None
    assert found.quality.engine is not None
    assert max(row.relative for row in found.quality.engine) < 0.1
    assert found.quality.image_psnr_db is not None
    assert min(found.quality.image_psnr_db) > 25


@pytest.mark.parametrize("target", CPU_TARGETS)
def test_a_lora_goes_onto_an_int8_engine_and_off_without_a_trace(target: str, tmp_path: Path) -> None:
    unet = small_pipeline().unet
    names = [path for path, _ in unet.named_modules() if path.endswith(LAYERS) and "attn2" not in path]
    save_file(kohya(unet, names, size=0.02), tmp_path / "lora.safetensors")

    def drawn(pipe: Any) -> torch.Tensor:
        given: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 32, "width": 32}
        generator = torch.Generator().manual_seed(0)
        found: torch.Tensor = pipe("a red star", generator=generator, output_type="latent", **given).images
        return found

    eager, pipe = pipeline_of(rounded_bundle()), load_pipeline(rounded_bundle(), f"{target}-int8")
    pipe.set_progress_bar_config(disable=True)
    own = drawn(pipe)
    for one in (eager, pipe):
        one.load_lora_weights(tmp_path / "lora.safetensors")
    wanted, found = drawn(eager), drawn(pipe)
    assert (found - wanted).norm() < 0.5 * (own - wanted).norm()
    pipe.unload_lora_weights()
    assert torch.equal(drawn(pipe), own)
