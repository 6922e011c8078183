"""SDXL (Podell et al. 2023, arXiv 2307.01952): two text encoders, three levels, sizes as conditions."""

from __future__ import annotations

from sdkd.families.family import CLIP, END, PROJECTED, Family, PublishedModel, TextEncoder
from sdkd.families.stable_diffusion import CLIP_L, VAE

_OPEN_CLIP_BIG_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip
_REFINER = "SDXL's refiner, a second model for the last steps: give the base model, and run the refiner in diffusers"
UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

SDXL = Family(
    name="sdxl",
    title="SDXL",
    text_encoders=(
        TextEncoder("text_encoder", "tokenizer", (CLIP,), ("conditioner.embedders.0.transformer.",), "lora_te1_"),
        TextEncoder("text_encoder_2", "tokenizer_2", (PROJECTED,), ("conditioner.embedders.1.model.",), "lora_te2_"),
    ),
    pipelines={
        "StableDiffusionXLPipeline": "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline": "StableDiffusionXLPipeline",
        "StableDiffusionXLInpaintPipeline": "StableDiffusionXLInpaintPipeline",
    },
    by_channels={4: "StableDiffusionXLPipeline", 9: "StableDiffusionXLInpaintPipeline"},
    controlnet="StableDiffusionXLControlNetPipeline",
    models={
        "sdxl": PublishedModel(
            UNET, (CLIP_L, _OPEN_CLIP_BIG_G), (END, "!"), 1024, "epsilon", "EulerDiscreteScheduler",
            VAE | {"scaling_factor": 0.13025, "force_upcast": True},
        ),
    },
    noise={"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1},
    absent=("feature_extractor", "image_encoder"),
    options={"add_watermarker": False},
    addition="text_time",
    hidden_states=True,
    refused={"StableDiffusionXLInstructPix2PixPipeline": "an instruct-pix2pix model of SDXL, which is not exported"},
)  # fmt: skip
