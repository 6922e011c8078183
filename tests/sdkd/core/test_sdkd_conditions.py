"""The inputs of a T2I-Adapter are as its own features: of SD 1.x with four levels, of SDXL with three."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import T2IAdapter

from sdkd.core.conditions import INNER_RESIDUAL, Extras, condition_specs
from sdkd.families.sdxl import UNET as SDXL_UNET

SD: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
}
LATENTS = {"batch": 1, "height": 64, "width": 96}
SIZES = LATENTS | {f"{axis}_{by}": LATENTS[axis] // by for axis in ("height", "width") for by in (2, 4, 8)}


@pytest.mark.parametrize(
    ("config", "kind", "middle"),
    [(SD, "full_adapter", 1), (SD | {"mid_block_type": None}, "light_adapter", 0), (SDXL_UNET, "full_adapter_xl", 0)],
)
def test_the_inputs_of_a_t2i_adapter_are_its_features(config: dict[str, Any], kind: str, middle: int) -> None:
    specs = condition_specs({**config, "addition_embed_type": None}, "float16", Extras(inner_residuals=True))
    with torch.device("meta"):
        channels = [320, 640, 1280] if kind == "light_adapter" else [320, 640, 1280, 1280]
        adapter = T2IAdapter(channels=channels, adapter_type=kind, downscale_factor=16 if kind.endswith("xl") else 8)
        features = adapter(torch.empty(1, 3, 8 * LATENTS["height"], 8 * LATENTS["width"]))
    assert [spec.name for spec in specs] == [f"{INNER_RESIDUAL}.{index}" for index in range(4 + middle)]
    assert [spec.shape(SIZES) for spec in specs][:4] == [tuple(feature.shape) for feature in features]
