"""LoRA of a UNet by PEFT: added, saved so that nothing is lost, and read back.

The file holds PEFT's own names for every weight (diffusers' older names cover attention only, and a file of both
loses the attention) and, as metadata that diffusers reads, rank, alpha and targets: without it an alpha other than the
rank is lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdkd.core.documents import parse_json
from sdkd.core.files import write_bytes
from sdkd.core.marks import LORA_MARK
from sdkd.core.schema import problem
from sdkd.errors import InputError, ModelError
from sdkd.students.lora_layers import other_kind

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

FILE = "pytorch_lora_weights.safetensors"
ADAPTER = "default"
METADATA = "lora_adapter_metadata"  # diffusers' LORA_ADAPTER_METADATA_KEY
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
_CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj")
# Types of the settings that are read of a file, whatever part of a pipeline they are of.
_SETTINGS = {
    "r": int,
    "lora_alpha": float,
    "rank_pattern": dict[str, int] | None,
    "alpha_pattern": dict[str, float] | None,
    "target_modules": list[str] | str | None,
    "exclude_modules": list[str] | str | None,
}
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


def save_lora(unet: UNet2DConditionModel, folder: Path) -> Path:
    """Write the adapter into a folder, as a file that `pipe.load_lora_weights(folder)` reads; returns the file."""
    return write_lora(folder / FILE, lora_state(unet), lora_metadata(unet))


def write_lora(path: Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> Path:
    """Write LoRA weights and their settings as one .safetensors file, whole or not at all."""
    from safetensors.torch import save

    notes = {"format": "pt", **LORA_MARK}
    if metadata:
        notes[METADATA] = json.dumps(dict(metadata), indent=2, sort_keys=True, default=str)
    write_bytes(path, save({name: value.contiguous() for name, value in state.items()}, metadata=notes))
    return path


def read_lora(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and settings of a LoRA file, or of a folder that holds one; settings are empty when the file has none.

    Raises InputError when it is missing, no .safetensors file (others can run code on loading), damaged, or no LoRA.
    """
    from safetensors import SafetensorError, safe_open

    file = _lora_file(Path(path))
    try:
        with safe_open(file, framework="pt") as stream:
            names = stream.keys()  # it is no dict
            state = {name: stream.get_tensor(name) for name in names}
            notes = stream.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"LoRA {str(file)!r} cannot be read ({error}): download or make it again") from error
    if not any("lora" in name for name in state) and other_kind(state) is None:
        first = min(state, default="none")
        raise InputError(f"file {str(file)!r} is no LoRA (first weight: {first}): give a LoRA's .safetensors file")
    return state, _settings(file, notes.get(METADATA, "{}"))


def _settings(file: Path, text: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = parse_json(text.encode(), dict[str, Any])
        for name, value in found.items():
            if wrong := problem(value, _SETTINGS.get(name.rpartition(".")[2], Any), name):
                raise ValueError(f"is damaged ({wrong})")
    except ValueError as error:
        raise InputError(f"LoRA {str(file)!r} has unusable settings: {METADATA} {error}; make it again") from None
    return found


def _lora_file(path: Path) -> Path:
    if path.is_dir():
        found = [path / FILE] if (path / FILE).is_file() else sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise InputError(f"folder {str(path)!r} holds {len(found)} .safetensors files: give the LoRA's own")
        return found[0]
    if not path.is_file():
        raise InputError(f"LoRA {str(path)!r} does not exist: give a .safetensors file, or a folder that holds one")
    if path.suffix != ".safetensors":
        raise InputError(
            f"LoRA {str(path)!r} is a {path.suffix or 'nameless'} file: only .safetensors is read "
            "(others can run code on loading); convert it first"
        )
    return path
