"""Tiny real components with fixed weights: seconds to export, build and run on a CPU."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

CONTEXT = 32
CROSS = "CrossAttnDownBlock2D"
UP = "CrossAttnUpBlock2D"
TEACHER_UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": (CROSS, CROSS, CROSS, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", UP, UP, UP),
    "block_out_channels": (16, 32, 32, 32),
    "layers_per_block": 2,
    "cross_attention_dim": CONTEXT,
    "attention_head_dim": (1, 2, 2, 2),  # heads of width 16, as fused kernels need
    "norm_num_groups": 8,
}
VAE: dict[str, Any] = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 64,
    "scaling_factor": 0.5,
}


def fixed_weights(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Overwrite all parameters deterministically, so that results do not hang on initialisers."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            value = 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise
        else:
            fan_in = max(parameter[0].numel(), 1) if parameter.dim() > 1 else 16
            value = noise / fan_in**0.5 if parameter.dim() > 1 else 0.1 * noise
        parameter.data.copy_(value)
    return module.eval().requires_grad_(False)


def tiny_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """An SD-shaped UNet: 4 levels, cross attention, mid block; latents 8x8x4."""
    return fixed_weights(UNet2DConditionModel(**(TEACHER_UNET | changes)), seed)


def tiny_vae(seed: int = 1) -> AutoencoderKL:
    """An AutoencoderKL with 8 pixels per latent."""
    return fixed_weights(AutoencoderKL(**VAE), seed)


def tiny_text_encoder(seed: int = 2, vocabulary: int = 600) -> CLIPTextModel:
    """A CLIP text encoder: 2 layers, 32 wide, 77 positions."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=CONTEXT,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return fixed_weights(CLIPTextModel(config), seed)


@cache
def tiny_tokenizer() -> CLIPTokenizer:
    """A genuine byte-level CLIP tokenizer without merges: one token per letter."""
    import json

    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def tiny_pipeline(seed: int = 0, student: str | None = None) -> StableDiffusionPipeline:
    """A whole Stable Diffusion 1.x-shaped pipeline for 64x64 images; with `student`, its UNet is that student."""
    unet = tiny_unet(seed)
    if student:
        from sdkd.students.blocks import build_student

        unet = build_student(unet, student).eval().requires_grad_(False)
    pipe = StableDiffusionPipeline(
        vae=tiny_vae(seed + 1),
        text_encoder=tiny_text_encoder(seed + 2),
        tokenizer=tiny_tokenizer(),
        unet=unet,
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
