"""A small UNet of SDXL's shape: 3 levels, transformer blocks as many as SDXL's, sizes as conditions; fixed weights."""

from __future__ import annotations

from typing import Any

import helpers
import torch
from diffusers import UNet2DConditionModel

CROSS, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
POOLED = 16  # width of the pooled text embedding
SDXL_UNET: dict[str, Any] = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", CROSS, CROSS),
    "up_block_types": (UP, UP, "UpBlock2D"),
    "block_out_channels": (16, 32, 32),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (1, 2, 2),
    "cross_attention_dim": helpers.CONTEXT,
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": POOLED + 6 * 8,
}


def small_sdxl_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """A teacher; latents 8x8x4."""
    return helpers.fixed_weights(UNet2DConditionModel(**(SDXL_UNET | changes)), seed)  # type: ignore[return-value]


def sdxl_output(unet: UNet2DConditionModel) -> torch.Tensor:
    """What it makes of fixed inputs [2, 4, 8, 8] and their conditions."""
    generator = torch.Generator().manual_seed(3)
    sample, text, pooled = (
        torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (5, helpers.CONTEXT), (POOLED,))
    )
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64], [48.0, 96, 8, 0, 64, 64]])}
    with torch.no_grad():
        found: torch.Tensor = unet(sample, torch.tensor([7, 500]), text, added_cond_kwargs=added).sample
    return found
