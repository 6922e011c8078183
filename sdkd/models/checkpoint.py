"""A checkpoint of a run as a model: its UNet, the averaged one where there is one, among the parts of its base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkd.errors import ModelError
from sdkd.models.diffusers_folder import load_unet, provenance
from sdkd.models.safetensors_file import folder_tensors

if TYPE_CHECKING:
    import torch

RECORD = "checkpoint.json"
BASE = "base"  # key of the checkpoint's sdkd.json: the model that the run was given


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run of sdkd."""
    return (folder / RECORD).is_file()


def unet_folder(folder: Path) -> Path:
    """The folder of the UNet that a checkpoint stands for; ModelError for one of a LoRA or without weights."""
    if (folder / "lora").is_dir():
        base = provenance(folder).get(BASE) or "its model"
        raise ModelError(
            f"checkpoint {str(folder)!r} holds a LoRA, not a model: load {base}, and give its pipeline's "
            f"load_lora_weights the folder {str(folder / 'lora')!r}"
        )
    found = next((folder / name for name in ("unet_ema", "unet") if (folder / name / "config.json").is_file()), None)
    if found is None:
        raise ModelError(f"checkpoint {str(folder)!r} holds no UNet: its files are incomplete; give another checkpoint")
    folder_tensors(found)
    return found


def base_of(folder: Path) -> str:
    """The name of the model whose other parts belong to a checkpoint's UNet; ModelError when it says none."""
    if base := provenance(folder).get(BASE):
        return str(base)
    raise ModelError(
        f"checkpoint {str(folder)!r} does not say which model it was trained on: go on from it with --resume, and use "
        "the finished pipeline"
    )


def load_own(folder: Path, dtype: torch.dtype) -> Any:
    """A checkpoint's UNet, in `dtype`."""
    return load_unet(unet_folder(folder), dtype)
