"""Images of pipelines, whether they agree, and LoRA files with fixed weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict


def save_lora(
    pipe: Any, folder: Path, seed: int, *, text: bool = False, alphas: Mapping[str, float] | None = None
) -> Path:
    """A LoRA with random weights for the UNet's attention and first convolutions, and for the text encoder.

    With `alphas` (of modules of the UNet) the file holds its settings, too.
    """
    torch.manual_seed(seed)
    changed = copy.deepcopy({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    targets = {"unet": ["to_q", "to_k", "to_v", "to_out.0", "conv1"], "text_encoder": ["q_proj", "v_proj"]}
    layers = {}
    for part in ("unet", "text_encoder") if text else ("unet",):
        changed[part].add_adapter(LoraConfig(r=4, target_modules=targets[part], lora_alpha=6, init_lora_weights=False))
        layers[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(get_peft_model_state_dict(changed[part]))
    if alphas is not None:
        settings = changed["unet"].peft_config["default"].to_dict()
        layers["unet_lora_adapter_metadata"] = settings | {"alpha_pattern": dict(alphas)}
    StableDiffusionPipeline.save_lora_weights(folder, **layers)
    return folder


def draw(pipe: Any, prompt: Any = "a cat", **options: Any) -> np.ndarray:
    """Two steps from seed 0, as an array in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    usual = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "np"}
    images: np.ndarray = pipe(prompt, generator=torch.Generator().manual_seed(0), **(usual | options)).images
    return images


def agree(one: np.ndarray, other: np.ndarray, decibels: float = 60.0) -> None:
    """Equal but for the order of sums: bf16 in place of fp32 is about 45 dB."""
    error = float(np.mean((np.asarray(one, np.float64) - np.asarray(other, np.float64)) ** 2))
    assert one.shape == other.shape
    assert 10 * np.log10(1 / max(error, 1e-12)) > decibels


def differ(one: np.ndarray, other: np.ndarray) -> None:
    """Another image, by far more than rounding."""
    assert np.abs(one - other).max() > 0.02
