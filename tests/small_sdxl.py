"""An SDXL-shaped pipeline that exports in seconds: three levels, two text encoders, sizes as conditions."""

from __future__ import annotations

from functools import cache
from typing import Any

import helpers
import small_bundles
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from helpers import fixed_weights
from made_once import made_once
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from sdkd.bundle.manifest import Bundle

PROJECTED, TIME = 16, 8  # widths of the projected text, and of the embedding of one of the six sizes
UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 2),
    "layers_per_block": 1,
    "cross_attention_dim": 2 * helpers.CONTEXT,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME,
    "projection_class_embeddings_input_dim": PROJECTED + 6 * TIME,
    "norm_num_groups": 8,
}
VAE = small_bundles.VAE | {"force_upcast": True}


def second_text_encoder(seed: int = 3) -> CLIPTextModelWithProjection:
    """A text encoder with a projection, as wide as the first."""
    config = CLIPTextConfig(**(helpers.tiny_text_encoder().config.to_dict() | {"projection_dim": PROJECTED}))
    return fixed_weights(CLIPTextModelWithProjection(config), seed)


def sdxl_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """An SDXL-shaped UNet: three levels, the first without attention; latents 8x8x4."""
    return fixed_weights(UNet2DConditionModel(**(UNET | changes)), seed)


def sdxl_pipeline(seed: int = 0, **unet: Any) -> StableDiffusionXLPipeline:
    """A whole pipeline of 2 pixels per latent; `unet` changes its UNet's config."""
    pipe = StableDiffusionXLPipeline(
        vae=fixed_weights(AutoencoderKL(**VAE), seed + 1),
        text_encoder=helpers.tiny_text_encoder(seed + 2),
        text_encoder_2=second_text_encoder(seed + 3),
        tokenizer=helpers.tiny_tokenizer(),
        tokenizer_2=helpers.tiny_tokenizer(),
        unet=sdxl_unet(seed, **unet),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def sdxl_bundle() -> Bundle:
    """The pipeline exported in float32, checked; read it, do not change it."""
    from export import export_pipeline

    return Bundle.open(made_once("exported-sdxl", lambda path: export_pipeline(sdxl_pipeline(), path)))
