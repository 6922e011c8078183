"""LoRA of a UNet by PEFT: added, and saved so that nothing is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdkd.errors import InputError, ModelError
from sdkd.students.lora_file import FILE, write_lora

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

ADAPTER = "default"
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
_CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")
TARGETS: dict[str, tuple[str, ...]] = {
    "attn": _ATTENTION,
    "attn+ff": _ATTENTION + _FEED_FORWARD,
    "all": _ATTENTION + _FEED_FORWARD + _CONVOLUTIONS,
}


def add_lora(
    unet: UNet2DConditionModel, *, rank: int, alpha: float, targets: str = "attn", dropout: float = 0.0, seed: int = 0
) -> list[torch.nn.Parameter]:
    """Add an adapter and return its parameters, float32 and trainable; everything else is frozen.

    `targets` is a key of TARGETS. Matrices A are drawn from `seed`, B is 0: the output is unchanged at first.
    Raises InputError for unknown targets and a rank that no layer has room for, ModelError when the UNet carries an
    adapter already.
    """
    from peft import LoraConfig

    if targets not in TARGETS:
        raise InputError(f"lora_targets {targets!r} is unknown: choose one of {', '.join(TARGETS)}")
    if getattr(unet, "peft_config", None):
        raise ModelError("the UNet carries an adapter already: fuse or unload it first")
    _check_rank(unet, rank, TARGETS[targets])
    unet.requires_grad_(False)
    whole = int(alpha) if float(alpha).is_integer() else alpha
    config = LoraConfig(r=rank, lora_alpha=whole, lora_dropout=dropout, target_modules=list(TARGETS[targets]))
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    unet.add_adapter(config, adapter_name=ADAPTER)
    torch.set_rng_state(state)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters


def _check_rank(unet: UNet2DConditionModel, rank: int, targets: Sequence[str]) -> None:
    """InputError for a rank above the widths of all layers: it adds memory and nothing else."""
    layers = {
        name: min(module.weight.shape[0], module.weight[0].numel())
        for name, module in unet.named_modules()
        if name.endswith(tuple(f".{target}" for target in targets)) and hasattr(module, "weight")
    }
    widest = max(layers, key=lambda name: layers[name])
    if rank > layers[widest]:
        raise InputError(
            f"lora_rank {rank} is above what any layer has room for: a rank of {layers[widest]} changes {widest}, the "
            f"widest of them, in every way. Give at most {layers[widest]}; 4 to 128 is usual"
        )


def lora_state(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """The adapter's weights on the CPU, under PEFT's names with the prefix `unet.`."""
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(unet, adapter_name=ADAPTER)
    return {f"unet.{name}": value.detach().cpu().contiguous() for name, value in found.items()}


def lora_metadata(unet: UNet2DConditionModel) -> dict[str, Any]:
    """The adapter's settings as diffusers wants them in a file: `unet.r`, `unet.lora_alpha`, ..."""
    # PEFT leaves a loaded adapter's dropout on: with it, the same seed would give another image every time.
    config = unet.peft_config[ADAPTER].to_dict() | {"lora_dropout": 0.0}
    return {f"unet.{key}": sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def save_lora(unet: UNet2DConditionModel, folder: Path, about: Mapping[str, Any] | None = None) -> Path:
    """Write the adapter into a folder, as a file that `pipe.load_lora_weights(folder)` reads; returns the file.

    `about`: what is noted in it, such as how a model is to be run with it.
    """
    return write_lora(folder / FILE, lora_state(unet), lora_metadata(unet), about)
