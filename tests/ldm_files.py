"""Checkpoints in one file as the original Stable Diffusion code lays them out, made from diffusers pipelines.

Written apart from sdkd's own names, so that one checks the other.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
_RESNET = [
    ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0"), ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection"),
]  # fmt: skip
_OUTSIDE = [
    ("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"),
    ("mid_block.resnets.0", "middle_block.0"), ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.1", "middle_block.2"),
]  # fmt: skip
_CLIP_LAYER = [
    ("encoder.layers", "transformer.resblocks"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("self_attn.out_proj", "attn.out_proj"),
    ("final_layer_norm", "ln_final"), ("embeddings.token_embedding", "token_embedding"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
]  # fmt: skip


def _replaced(name: str, pairs: list[tuple[str, str]]) -> str:
    for own, original in pairs:
        name = re.sub(rf"(^|\.){re.escape(own)}(?=\.|$)", rf"\g<1>{original}", name)
    return name


def unet_name(name: str, plain: int = 0) -> str:
    """LDM's name of a weight of a UNet with two layers a level; `plain`: the level up that has no attention."""
    found = re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.+)", name)
    if not found:
        return _replaced(_replaced(name, _OUTSIDE), _RESNET if "resnets" in name else [])
    side, level, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    if kind == "downsamplers":
        return f"input_blocks.{3 * level + 3}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{3 * level + 2}.{1 if level == plain else 2}.{rest}"
    block = f"input_blocks.{3 * level + layer + 1}" if side == "down" else f"output_blocks.{3 * level + layer}"
    return f"{block}.0.{_replaced(rest, _RESNET)}" if kind == "resnets" else f"{block}.1.{rest}"


def vae_name(name: str) -> str:
    """LDM's name of a weight of a VAE with four levels."""
    name = re.sub(r"decoder\.up_blocks\.(\d)", lambda found: f"decoder.up.{3 - int(found[1])}", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    for pattern, text in {
        r"down_blocks": "down", r"resnets": "block", r"(down|up)samplers\.0": r"\1sample",
        r"mid_block\.attentions\.0": "mid.attn_1", r"conv_norm_out": "norm_out", r"conv_shortcut": "nin_shortcut",
        r"group_norm": "norm", r"to_(q|k|v)\b": r"\1", r"to_out\.0": "proj_out",
    }.items():  # fmt: skip
        name = re.sub(pattern, text, name)
    return name


def clip_state(module: Any, prefix: str = CLIP) -> dict[str, torch.Tensor]:
    """The text encoder of SD 1.x, the first one of SDXL."""
    return {
        f"{prefix}text_model.{name.removeprefix('text_model.')}": value for name, value in module.state_dict().items()
    }


def open_clip_state(module: Any, prefix: str = OPEN_CLIP) -> dict[str, torch.Tensor]:
    """The text encoder of SD 2.x, the second one of SDXL: q, k and v in one, and one layer more than is used."""
    own = {name.removeprefix("text_model."): value for name, value in module.state_dict().items()}
    result = {}
    for name, value in own.items():
        if "self_attn.q_proj" in name:
            three = [own[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            layer, kind = re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(\w+)", name).groups()  # type: ignore[union-attr]
            result[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(three)
        elif "self_attn" not in name or "out_proj" in name:
            result[_replaced(name, _CLIP_LAYER)] = value
    last = max(int(found[1]) for name in own if (found := re.match(r"encoder\.layers\.(\d+)\.", name)))
    more = {
        name.replace(f"resblocks.{last}.", f"resblocks.{last + 1}."): torch.zeros_like(value)
        for name, value in result.items()
        if f"resblocks.{last}." in name
    }
    width = module.config.hidden_size
    projection = own.get("text_projection.weight", torch.zeros(width, width)).T
    unused = {"logit_scale": torch.zeros(()), "text_projection": projection}
    result.pop("text_projection.weight", None)
    return {prefix + name: value for name, value in (result | more | unused).items()}


def unet_state(unet: Any, plain: int = 0) -> dict[str, torch.Tensor]:
    return {UNET + unet_name(name, plain): value for name, value in unet.state_dict().items()}


def vae_state(vae: Any) -> dict[str, torch.Tensor]:
    """With attention as convolutions of one pixel."""
    attention = (".q.weight", ".k.weight", ".v.weight", ".proj_out.weight")
    named = {VAE + vae_name(name): value for name, value in vae.state_dict().items()}
    return {name: value[:, :, None, None] if name.endswith(attention) else value for name, value in named.items()}


def ldm_state(pipe: Any, open_clip: bool = False) -> dict[str, torch.Tensor]:
    """All weights of a pipeline, and some that checkpoints have beside them."""
    text = (open_clip_state if open_clip else clip_state)(pipe.text_encoder)
    unused = {"alphas_cumprod": torch.zeros(1000), "model_ema.decay": torch.zeros(())}
    return unet_state(pipe.unet) | vae_state(pipe.vae) | text | unused


def sdxl_state(pipe: Any) -> dict[str, torch.Tensor]:
    """All weights of a pipeline of SDXL, whose deepest level up has attention, and none has what its finest has not."""
    first = clip_state(pipe.text_encoder, "conditioner.embedders.0.transformer.")
    second = open_clip_state(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    return unet_state(pipe.unet, plain=-1) | vae_state(pipe.vae) | first | second


def write(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Save a state dict as a .safetensors file; its path."""
    save_file({name: value.contiguous() for name, value in state.items()}, path, metadata=metadata)
    return path
