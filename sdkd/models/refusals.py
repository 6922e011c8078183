"""What a file or folder is that is not a Stable Diffusion model, and what to do with it: for the messages."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from sdkd.core.files import read_json
from sdkd.errors import InputError, an
from sdkd.families import SUPPORTED
from sdkd.models.safetensors_file import Tensor

_LORA = (
    "is a LoRA, not a model: give its base model, and the LoRA with --lora (sdkd export, sdkd build-engine), which "
    "fuses it"
)
_CONTROLNET = "is a ControlNet, not a model: give its base model, and the ControlNet with --controlnet"


# Patterns of names that give a kind of weights away, and what to say of it. LoRAs come first: theirs hold the names of
# what they change.
_KINDS = {
    r"(^|\.)lora_|\.lora\.|_lora\.|\.(hada|lokr)_w\d": _LORA,
    r"^control_model\.|^controlnet_|^input_hint_block\.": _CONTROLNET,
    r"(^|\.)((double|single|single_transformer|joint)_blocks|ip_adapter)\.|^(context_embedder|depth_model|image_proj)\."
    r"|motion_modules\.": f"is not for Stable Diffusion alone (Flux, SD 3, AnimateDiff, ...): {SUPPORTED}",
}
# Parts of a pipeline on their own; looked for only where the UNet of a checkpoint is missing.
_PARTS = {
    r"^(first_stage_model\.)?(decoder\.|encoder\.(mid|down|conv_in))": "a VAE",
    r"^(input_blocks|middle_block|output_blocks|down_blocks|up_blocks)\.": "a UNet",
    r"^(cond_stage_model\.|conditioner\.|text_model\.|transformer\.resblocks\.|encoder\.layers\.)": "a text encoder",
}
_EMBEDDING = (
    "is a textual-inversion embedding, not a model: give the model that it belongs to, and load the embedding with "
    "pipe.load_textual_inversion(FILE)"
)
_EMA = (
    "holds averaged (EMA) weights of its UNet alone (model_ema.*, names without dots): give the checkpoint that has "
    "model.diffusion_model.* as well, or save the averaged weights under those names"
)


def what_it_is(tensors: Mapping[str, Tensor], needed: str) -> str | None:
    """What weights are that are not those of an SD checkpoint, for a message; None when they have the `needed` name."""
    foreign = _first(_KINDS, tensors)
    if foreign or needed in tensors:
        return foreign
    if 0 < len(tensors) <= 2 and all(len(t.shape) in (1, 2) and t.shape[-1] >= 768 for t in tensors.values()):
        return _EMBEDDING
    if any(name.startswith("model_ema.diffusion_model") for name in tensors):
        return _EMA
    if part := _first(_PARTS, tensors):
        return f"is {part} alone: give the diffusers folder or the whole checkpoint that it belongs to"
    if any(name.startswith("model.diffusion_model.") for name in tensors):
        return f"holds another architecture: {SUPPORTED}"
    return (
        f"holds no Stable Diffusion UNet (its first weight is {min(tensors, default='none')}): give a whole checkpoint"
    )


def _first(kinds: Mapping[str, str], names: Collection[str]) -> str | None:
    return next((said for pattern, said in kinds.items() if any(re.search(pattern, name) for name in names)), None)


# Files of folders that are no pipelines, and what such a folder is.
_FILES = {
    "adapter_config.json": _LORA,
    "adapter_model.safetensors": _LORA,
    "pytorch_lora_weights.safetensors": _LORA,
    "learned_embeds.safetensors": _EMBEDDING,
    "learned_embeds.bin": _EMBEDDING,
}


OTHER_EXPORT = (
    "is an export by Optimum or another tool (ONNX or OpenVINO graphs without PyTorch weights): give the model that it "
    "was made from"
)


def is_other_export(path: Path) -> bool:
    """Whether a pipeline folder holds ONNX or OpenVINO graphs in the place of PyTorch weights."""
    graphs = any(any(path.glob(f"*/*{kind}")) for kind in ("model.onnx", "openvino_model.xml"))
    return graphs and not any(path.glob("unet/*.safetensors"))


def other_folder(path: Path) -> str:
    """What a folder without model_index.json is, for a message."""
    if any(path.glob("*.onnx")) or any(path.glob("*.xml")) or is_other_export(path):
        return OTHER_EXPORT
    for name, what in _FILES.items():
        if (path / name).is_file():
            return what
    try:
        config = dict(read_json(path / "config.json"))
    except (InputError, TypeError, ValueError):
        config = {}
    kind = str(config.get("_class_name") or next(iter(config.get("architectures") or []), ""))
    if kind.startswith("ControlNet"):
        return _CONTROLNET
    if kind:
        return f"holds {an(kind)} alone, a part of a pipeline: give the folder above it, which has model_index.json"
    return (
        "is not a diffusers pipeline (no model_index.json): give the folder that pipeline.save_pretrained wrote, "
        "not one of its parts"
    )
