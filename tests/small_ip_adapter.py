"""IP-Adapters for small UNets, as files and state dicts of the published form, and an image encoder of 5 tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers import fixed_weights
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

WIDTH, HIDDEN, TOKENS = 12, 24, 5  # of the image encoder: its embedding, its hidden states, how many of them
State = dict[str, dict[str, torch.Tensor]]


def image_encoder() -> CLIPVisionModelWithProjection:
    """CLIP's, of two layers, for images of 28 pixels."""
    config = CLIPVisionConfig(
        hidden_size=HIDDEN, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28,
        patch_size=14, projection_dim=WIDTH,
    )  # fmt: skip
    return fixed_weights(CLIPVisionModelWithProjection(config), 11)


def feature_extractor() -> CLIPImageProcessor:
    """What makes pixels for it."""
    return CLIPImageProcessor(size=28, crop_size=28)


def ip_adapter(unet: Any, kind: str = "plain", seed: int = 0) -> State:
    """An adapter for a UNet, `plain`, `plus` or `faceid`, with random weights."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    context = unet.config.cross_attention_dim
    projection = {"plain": _plain, "plus": _plus, "faceid": _faceid}[kind](context, random)
    attention = {}
    for number, name in enumerate(unet.attn_processors):
        layer = unet.get_submodule(name.removesuffix(".processor"))
        width = layer.to_q.out_features
        if ".attn2." in name:
            attention |= {f"{number}.to_{part}_ip.weight": 2 * random(width, context) for part in "kv"}
        if kind == "faceid":
            for part, module in {"q": layer.to_q, "k": layer.to_k, "v": layer.to_v, "out": layer.to_out[0]}.items():
                attention[f"{number}.to_{part}_lora.down.weight"] = random(2, module.in_features)
                attention[f"{number}.to_{part}_lora.up.weight"] = random(module.out_features, 2)
    return {"image_proj": projection, "ip_adapter": attention}


def _norm(name: str, width: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}


def _plain(context: int, random: Any) -> dict[str, torch.Tensor]:
    return {"proj.weight": random(4 * context, WIDTH), "proj.bias": random(4 * context)} | _norm("norm", context)


def _faceid(context: int, random: Any) -> dict[str, torch.Tensor]:
    found = {"proj.0.weight": random(2 * WIDTH, WIDTH), "proj.0.bias": random(2 * WIDTH)}
    return found | {
        "proj.2.weight": random(4 * context, 2 * WIDTH), "proj.2.bias": random(4 * context), **_norm("norm", context),
    }  # fmt: skip


def _plus(context: int, random: Any) -> dict[str, torch.Tensor]:
    width = 16
    found = {"latents": random(1, 3, width), "proj_in.weight": random(width, HIDDEN), "proj_in.bias": random(width)}
    found |= {"proj_out.weight": random(context, width), "proj_out.bias": random(context), **_norm("norm_out", context)}
    for layer in (f"layers.{number}" for number in range(4)):
        found |= {**_norm(f"{layer}.0.norm1", width), **_norm(f"{layer}.0.norm2", width)}
        found |= {f"{layer}.0.to_q.weight": random(64, width), f"{layer}.0.to_kv.weight": random(128, width)}
        found |= {f"{layer}.0.to_out.weight": random(width, 64), **_norm(f"{layer}.1.0", width)}
        found |= {f"{layer}.1.1.weight": random(4 * width, width), f"{layer}.1.3.weight": random(width, 4 * width)}
    return found


def write(state: State, file: Path) -> Path:
    """The adapter as a .safetensors file."""
    flat = {f"{part}.{name}": tensor.contiguous() for part, found in state.items() for name, tensor in found.items()}
    save_file(flat, file)
    return file


def prompted(pipe: Any, *states: State) -> Any:
    """A pipeline with adapters loaded, an image encoder and a feature extractor; the same pipeline."""
    pipe.register_modules(image_encoder=image_encoder(), feature_extractor=feature_extractor())
    pipe.load_ip_adapter(list(states), subfolder="", weight_name=[""] * len(states), image_encoder_folder=None)
    return pipe
