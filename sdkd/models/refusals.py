"""What a file or folder is that is not a Stable Diffusion model, and what to do with it: for the messages."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sdkd.core.files import read_json
from sdkd.errors import InputError, an
from sdkd.models.safetensors_file import Tensor

SUPPORTED = "sdkd works on Stable Diffusion 1.x and 2.x"
_LORA = (
    "is a LoRA, not a model: fuse it into its base model (pipe.load_lora_weights(FILE), pipe.fuse_lora(), "
    "pipe.unload_lora_weights(), pipe.save_pretrained(FOLDER)) and give that folder"
)
_CONTROLNET = "is a ControlNet, not a model: give its base model, and the ControlNet with --controlnet"
_ALONE = "give the diffusers folder or the whole checkpoint that it belongs to"
_OTHER = f"another architecture: {SUPPORTED}"


class Kind(NamedTuple):
    """Names that give a kind of weights away, and what to say of it."""

    pattern: str
    message: str


# The first that matches any name is it. LoRAs come first: theirs hold the names of what they change.
KINDS = tuple(
    Kind(pattern, message)
    for pattern, message in (
        (r"(^|\.)lora_|\.lora\.|_lora\.|\.(hada|lokr)_w\d", _LORA),
        (r"^conditioner\.embedders\.1\.|^add_embedding\.", f"is SDXL: {SUPPORTED}"),
        (r"(^|\.)(double|single|single_transformer)_blocks\.", f"is Flux or a model like it: {SUPPORTED}"),
        (r"(^|\.)joint_blocks\.|^context_embedder\.", f"is Stable Diffusion 3: {SUPPORTED}"),
        (r"^control_model\.|^controlnet_|^input_hint_block\.", _CONTROLNET),
        (r"^depth_model\.", f"is a depth-to-image model, whose UNet takes a depth map as well: {SUPPORTED}"),
        (r"motion_modules\.", f"is a motion module of AnimateDiff, not a model: {SUPPORTED}"),
        (r"(^|\.)ip_adapter\.|^image_proj\.", f"is an IP-Adapter, not a model: {SUPPORTED}"),
    )
)
# Parts of a pipeline on their own; looked for only where the UNet of a checkpoint is missing.
PARTS = tuple(
    Kind(pattern, f"is {what} alone: {_ALONE}")
    for pattern, what in (
        (r"^(first_stage_model\.)?(decoder\.|encoder\.(mid|down|conv_in))", "a VAE"),
        (r"^(input_blocks|middle_block|output_blocks|down_blocks|up_blocks)\.", "a UNet"),
        (r"^(cond_stage_model\.|text_model\.|transformer\.resblocks\.|encoder\.layers\.)", "a text encoder"),
    )
)
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
    foreign = _first(KINDS, tensors)
    if foreign or needed in tensors:
        return foreign
    if _is_embedding(tensors.values()):
        return _EMBEDDING
    if any(name.startswith("model_ema.diffusion_model") for name in tensors):
        return _EMA
    if part := _first(PARTS, tensors):
        return part
    if any(name.startswith("model.diffusion_model.") for name in tensors):
        return f"holds {_OTHER}"
    return (
        f"holds no Stable Diffusion UNet (its first weight is {min(tensors, default='none')}): give a whole checkpoint"
    )


def _first(kinds: Iterable[Kind], names: Collection[str]) -> str | None:
    return next((kind.message for kind in kinds if any(re.search(kind.pattern, name) for name in names)), None)


def _is_embedding(tensors: Collection[Tensor]) -> bool:
    """A vector, or a few, for one or two text encoders."""
    return 0 < len(tensors) <= 2 and all(len(tensor.shape) in (1, 2) and tensor.shape[-1] >= 768 for tensor in tensors)


# Marks in the class names of pipelines that are not supported, and why.
_PIPELINES = {
    "ControlNet": "whose UNet works with a ControlNet: give its base model, and the ControlNet with --controlnet",
    "XL": "which has another UNet and two text encoders",
    "StableDiffusion3": "which is another architecture",
    "Flux": "which is another architecture",
    "Upscale": "whose UNet takes the image's noise level as well",
    "Depth2Img": "whose UNet takes a depth map as well",
    "UnCLIP": "whose UNet takes image embeddings as well",
    "ImageVariation": "whose UNet takes image embeddings instead of text",
}
# Files of folders that are no pipelines, and what such a folder is.
_FILES = {
    "adapter_config.json": _LORA,
    "adapter_model.safetensors": _LORA,
    "pytorch_lora_weights.safetensors": _LORA,
    "learned_embeds.safetensors": _EMBEDDING,
    "learned_embeds.bin": _EMBEDDING,
}


def other_pipeline(kind: Any) -> str:
    """Why a pipeline of this class is not supported, as a clause, or nothing."""
    return next((f", {why}" for mark, why in _PIPELINES.items() if mark.lower() in str(kind).lower()), "")


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
