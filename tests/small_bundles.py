"""The modules of a small pipeline, shared by all tests of a process; `small_exports` has bundles of them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from helpers import CONTEXT, CROSS, UP, fixed_weights, tiny_text_encoder, tiny_tokenizer

from export.graph.to_onnx import save, to_onnx
from sdkd.bundle.manifest import ComponentRecord, FileRecord
from sdkd.core.components import component_contract
from sdkd.core.contract import DTYPES, Precision

UNET: dict[str, Any] = {
    "sample_size": 16,
    "down_block_types": (CROSS, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", UP),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "cross_attention_dim": CONTEXT,
    "attention_head_dim": (1, 2),
    "norm_num_groups": 8,
    "mid_block_type": None,
}
VAE: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 32,
}


def _encode_text(module: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    output = module(ids)
    return output.last_hidden_state, output.pooler_output


CALLS: dict[str, Any] = {
    "unet": lambda m, sample, timestep, context: m(sample, timestep, context, return_dict=False)[0],
    "vae_decoder": lambda m, latents: m.decode(latents, return_dict=False)[0],
    "vae_encoder": lambda m, image: m._encode(image),
    "text_encoder": _encode_text,
}
OPSETS = {"unet": 23, "text_encoder": 23, "vae_decoder": 18, "vae_encoder": 18}
SIZES = {"batch": 2, "sequence": 77, "height": 16, "width": 24, "image_height": 32, "image_width": 48}


@cache
def small_modules() -> dict[str, torch.nn.Module]:
    """A two-level UNet (images of 32x32 pixels, latents of 16x16), its VAE and its text encoder."""
    vae = fixed_weights(AutoencoderKL(**VAE), 1)
    unet = fixed_weights(UNet2DConditionModel(**UNET), 0)
    return {"text_encoder": tiny_text_encoder(), "unet": unet, "vae_decoder": vae, "vae_encoder": vae}


def _write_config(folder: Path, module: torch.nn.Module) -> dict[str, Any]:
    config: Any = module.config
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values, default=str))
    return dict(values)


def export_component(root: Path, component: str, module: torch.nn.Module, precision: Precision) -> ComponentRecord:
    """Write <root>/<component>/model.onnx and config.json with the toolkit's names and axes."""
    folder = root / component
    config = _write_config(folder, module)
    contract = component_contract(component, config, precision)
    typed = module.to(getattr(torch, DTYPES[precision]))
    paths = save(to_onnx(typed, contract, config, OPSETS[component]), folder, limit=0)
    files = tuple(FileRecord.of(root, path) for path in paths)
    count = sum(parameter.numel() for parameter in module.parameters())
    return ComponentRecord(component, contract, precision, OPSETS[component], files, "0" * 64, count, 0.0)


def small_pipeline() -> StableDiffusionPipeline:
    """A small pipeline of modules that tests share, do not change them: images of 32x32 pixels, latents of 16x16."""
    modules = small_modules()
    pipe = StableDiffusionPipeline(
        vae=modules["vae_decoder"],
        text_encoder=modules["text_encoder"],
        tokenizer=tiny_tokenizer(),
        unet=modules["unet"],
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


TINY_VAE: dict[str, Any] = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1),
}


def small_controlnet(seed: int = 5, **changes: Any) -> ControlNetModel:
    """A ControlNet for `UNET`: images of 2 pixels per latent."""
    config = {key: value for key, value in UNET.items() if "up_block" not in key}
    config = {key: config[key] for key in config if key not in ("sample_size", "out_channels", "mid_block_type")}
    image = {"conditioning_embedding_out_channels": (8, 16)}
    return fixed_weights(ControlNetModel(**(config | image | changes)), seed)
