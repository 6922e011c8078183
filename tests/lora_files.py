"""LoRA files with fixed weights, in kohya's names and in the layout of the public LCM-LoRAs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# What diffusers' script for LCM-LoRAs trains, and so what the public files hold.
LCM_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"),
    *("conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)


# Of the small text encoder, as every version of transformers saves them.
TEXT = tuple(f"text_model.encoder.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj"))


def lcm_layers(unet: torch.nn.Module) -> list[str]:
    """The layers of a UNet that such a file has."""
    return [name for name, _ in unet.named_modules() if name.endswith(tuple(f".{target}" for target in LCM_TARGETS))]


def kohya(
    module: Any, names: Iterable[str], rank: int = 4, alpha: Callable[[int], float] = float, prefix: str = "lora_unet",
    size: float = 1.0,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """A kohya file for layers of a module, all from one seed; `alpha` of the layer's number, the next whole one."""
    generator, state = torch.Generator().manual_seed(3), {}
    for number, name in enumerate(names, 1):
        weight = module.get_submodule(name).weight
        key = f"{prefix}_{name.replace('.', '_')}"
        down = torch.randn(rank, *weight.shape[1:], generator=generator)
        up = size * torch.randn(weight.shape[0], rank, *(1, 1)[: weight.ndim - 2], generator=generator)
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        state[f"{key}.alpha"] = torch.tensor(alpha(number))
    return state


def kohya_text(module: Any) -> dict[str, torch.Tensor]:
    """A kohya file's weights for four layers of a small text encoder, whatever its transformers calls them."""
    here = [name for name, _ in module.named_modules() if name.endswith(("q_proj", "v_proj"))]
    state = kohya(module, here, prefix="lora_te")
    return {name.replace("lora_te_encoder", "lora_te_text_model_encoder"): value for name, value in state.items()}


def lcm_lora(unet: Any, file: Path, rank: int = 64) -> Path:
    """A file as latent-consistency/lcm-lora-sdv1-5 has it, for this UNet: its names, rank and alpha, in half."""
    state = kohya(unet, lcm_layers(unet), rank, lambda _: float(rank), size=0.001)
    save_file({name: value.half() for name, value in state.items()}, file)
    return file


def delta(state: dict[str, torch.Tensor], name: str, prefix: str = "lora_unet") -> torch.Tensor:
    """What such a file adds to a layer's weight."""
    key = f"{prefix}_{name.replace('.', '_')}"
    down, up = state[f"{key}.lora_down.weight"].float(), state[f"{key}.lora_up.weight"].float()
    return float(state[f"{key}.alpha"]) / len(down) * (up.flatten(1) @ down.flatten(1)).reshape(-1, *down.shape[1:])
