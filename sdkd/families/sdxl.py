"""SDXL (Podell et al. 2023, arXiv 2307.01952): two text encoders, three levels, sizes as conditions."""

from __future__ import annotations

from sdkd.families.family import CLIP, END, PROJECTED, Family, FewSteps, PublishedModel, TextEncoder
from sdkd.families.stable_diffusion import CLIP_L, VAE
from sdkd.families.student import (
    CROSS_DOWN,
    CROSS_UP,
    DOWN,
    MID,
    RESNET_MID,
    UP,
    LossWeights,
    StudentSpec,
    Transformers,
    first,
)

_OPEN_CLIP_BIG_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip
UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP, UP),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

# SSD-1B and Vega: Gupta et al. 2024, arXiv 2401.02677; all resnets but the middle's second stay; the loss weights are
# those of Segmind's distill_sdxl.py. KOALA: Lee et al. 2023, arXiv 2312.04005; layers are removed as in BK-SDM, and its
# loss weights are taken from there. The published configs say how many transformer blocks an attention keeps, and no
# published code says which: here it is the first ones, so that their names are the teacher's.
_SSD = Transformers(((), first(2, 2), first(4, 4)), (), (first(4, 4, 10), first(2, 1, 1), ()))
_VEGA = Transformers(((), first(1, 1), first(2, 2)), (), (first(2, 2, 2), first(1, 1, 1), ()))
_KOALA_1B = Transformers(((), first(2), first(6)), (*range(6),), (first(6, 6), first(2, 2), ()))
_KOALA_700M = Transformers(((), first(2), first(5)), (), (first(5, 5), first(2, 2), ()))
_SEGMIND, _KOALA = LossWeights(1.0, 0.5, 0.5), LossWeights(1.0, 1.0, 1.0)
_DOWN, _UP = (0, 1), (0, 1, 2)  # all layers

SDXL = Family(
    name="sdxl",
    title="SDXL",
    tag="stable-diffusion-xl",
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
    prefix="StableDiffusionXL",
    models={
        "sdxl": PublishedModel(
            UNET, (CLIP_L, _OPEN_CLIP_BIG_G), (END, "!"), 1024, "epsilon", "EulerDiscreteScheduler",
            VAE | {"scaling_factor": 0.13025, "force_upcast": True},
        ),
    },
    noise={"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1},
    absent=("feature_extractor", "image_encoder"),
    options={"add_watermarker": False},
    teacher={
        "down_block_types": UNET["down_block_types"],
        "up_block_types": UNET["up_block_types"],
        "mid_block_type": MID,
        "layers_per_block": 2,
        "reverse_transformer_layers_per_block": None,
        "addition_embed_type": "text_time",
        "class_embed_type": None,
        "encoder_hid_dim_type": None,
    },
    students=(
        StudentSpec("ssd-1b", "ssd-1b", "sdxl", RESNET_MID, 0, "layers", _SEGMIND, _DOWN, _UP, _SSD),
        StudentSpec("vega", "vega", "sdxl", RESNET_MID, 0, "layers", _SEGMIND, _DOWN, _UP, _VEGA),
        StudentSpec("koala-1b", "koala-1b", "sdxl", MID, 0, "self-attention", _KOALA, transformers=_KOALA_1B),
        StudentSpec("koala-700m", "koala-700m", "sdxl", None, 0, "self-attention", _KOALA, transformers=_KOALA_700M),
    ),
    addition="text_time",
    hidden_states=True,
    # SDXL-Turbo (arXiv 2311.17042) and SDXL-Lightning (arXiv 2402.13929), as their model cards draw.
    few_steps=(
        FewSteps(r"(?:sdxl|sd_xl)[-_]turbo", 1, "EulerAncestralDiscreteScheduler"),
        FewSteps(r"lightning.*?(\d+)[-_]?step", 4, "EulerDiscreteScheduler"),
    ),
    without={"text_encoder": "is SDXL's refiner, which draws an image's last steps alone: give the base model"},
)  # fmt: skip
