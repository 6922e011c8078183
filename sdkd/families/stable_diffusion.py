"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022, arXiv 2112.10752): one text encoder, four levels."""

from __future__ import annotations

from sdkd.families.family import CLIP, END, PROJECTED, Family, FewSteps, PublishedModel, TextEncoder
from sdkd.families.student import CROSS_DOWN, CROSS_UP, DOWN, MID, UP, LossWeights, StudentSpec

VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768, "hidden_act": "quick_gelu",
}  # fmt: skip
_OPEN_CLIP_H = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "projection_dim": 512, "hidden_act": "gelu",
}  # fmt: skip
_UNET_1 = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
_UNET_2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
_EMBEDDING = ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline")
_SEGMIND, _BK = LossWeights(1.0, 0.5, 0.5), LossWeights(1.0, 1.0, 1.0)

STABLE_DIFFUSION = Family(
    name="sd",
    title="Stable Diffusion 1.x, 2.x",
    tag="stable-diffusion",
    text_encoders=(
        TextEncoder(
            "text_encoder",
            "tokenizer",
            (CLIP, PROJECTED),
            ("cond_stage_model.transformer.", "cond_stage_model.model.", "conditioner.embedders.0.model."),
            "lora_te_",
        ),
    ),
    pipelines={
        "StableDiffusionPipeline": "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline": "StableDiffusionPipeline",
        "StableDiffusionInpaintPipeline": "StableDiffusionInpaintPipeline",
        "StableDiffusionInstructPix2PixPipeline": "StableDiffusionInstructPix2PixPipeline",
        **dict.fromkeys(_EMBEDDING, "LatentConsistencyModelPipeline"),
    },
    by_channels={
        4: "StableDiffusionPipeline",
        8: "StableDiffusionInstructPix2PixPipeline",
        9: "StableDiffusionInpaintPipeline",
    },
    prefix="StableDiffusion",
    models={
        "sd15": PublishedModel(_UNET_1, (CLIP_L,), (END,), 512, "epsilon", "PNDMScheduler", VAE),
        "sd21": PublishedModel(
            _UNET_2 | {"sample_size": 96, "upcast_attention": True},
            (_OPEN_CLIP_H,), ("!",), 768, "v_prediction", "DDIMScheduler", VAE,
        ),
        "sd21base": PublishedModel(
            _UNET_2 | {"sample_size": 64}, (_OPEN_CLIP_H,), ("!",), 512, "epsilon", "PNDMScheduler", VAE
        ),
    },
    noise={
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
        "set_alpha_to_one": False,
    },
    absent=("safety_checker", "feature_extractor", "image_encoder"),
    options={"requires_safety_checker": False},
    teacher={  # inpainting included
        "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
        "up_block_types": (UP, CROSS_UP, CROSS_UP, CROSS_UP),
        "mid_block_type": MID,
        "layers_per_block": 2,
        "addition_embed_type": None,
        "class_embed_type": None,
        "encoder_hid_dim_type": None,
    },
    # BK-SDM (Kim et al. 2023, arXiv 2305.15798); Segmind's sd-small and sd-tiny (distill-sd) remove the same blocks.
    students=(
        StudentSpec("sd-small", "small", "sd", MID, 0, "segmind", _SEGMIND),
        StudentSpec("sd-tiny", "tiny", "sd", None, 1, "segmind", _SEGMIND),
        StudentSpec("bk-base", "bk-base", "sd", MID, 0, "bk-sdm", _BK),
        StudentSpec("bk-small", "bk-small", "sd", None, 0, "bk-sdm", _BK),
        StudentSpec("bk-tiny", "bk-tiny", "sd", None, 1, "bk-sdm", _BK),
    ),
    few_steps=(FewSteps(r"sd[-_]turbo", 1, "EulerDiscreteScheduler"),),  # arXiv 2311.17042
    embedding=_EMBEDDING,
)  # fmt: skip
