"""Adapters that move with a part of a pipeline: from an eager module to its engine, and to the next engine."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from engines.lora.layers import adapters_of, announce, copy_adapters, has_adapters
from engines.modules.base import EngineModule
from sdkd.errors import ModelError


def check_adapters(part: str, module: nn.Module) -> None:
    """ModelError naming an adapter of an eager module that an engine cannot take over."""
    for path, layer in module.named_modules():
        where = f"{part}.{path}"
        if merged := getattr(layer, "merged_adapters", None):
            raise ModelError(
                f"the adapter {merged[0]!r} is fused into {where}, and a bundle has weights of its own: call "
                "pipe.unfuse_lora() first, and it is carried over to the engine; or call pipe.unload_lora_weights(), "
                "which leaves it in the weights, and export this pipeline"
            )
        if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper) and (kind := _kind(layer)):
            raise ModelError(
                f"{where} has an adapter that engines do not take ({kind}): fuse it (pipe.fuse_lora(), "
                "pipe.unload_lora_weights()) and export this pipeline, or unload it"
            )


def _kind(layer: Any) -> str | None:
    """What makes an adapter's layer more than an up and a down matrix; None for plain LoRA."""
    if isinstance(layer, AuxiliaryTrainingWrapper):
        return f"a whole layer, {type(layer).__name__}"
    if not isinstance(layer, LoraLayer):
        return type(layer).__module__.removeprefix("peft.tuners.").split(".")[0]
    if any(layer.use_dora.values()):
        return "DoRA"
    if any(layer.lora_bias.values()) or layer.lora_embedding_A or getattr(layer, "lora_variant", None):
        return "LoRA with biases, of an embedding or of a variant"
    return None if isinstance(layer.get_base_layer(), nn.Linear | nn.Conv2d) else type(layer).__name__


def carry_over(part: str, source: nn.Module, module: EngineModule) -> None:
    """Give a new engine the adapters of the module that it stands for: an eager one, or another engine's."""
    held = source.adapters if isinstance(source, EngineModule) else source
    if held is not None and has_adapters(held):
        copy_adapters(held, adapters_of(part, module))
        announce(module)
