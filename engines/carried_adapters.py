"""Adapters that move with a part of a pipeline: from an eager module to its engine, to the next engine, and back."""

from __future__ import annotations

import copy
from typing import Any

from diffusers.utils import recurse_remove_peft_layers
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from engines.lora import adapters_of, announce, fill_adapter, lora_layers
from engines.module import EngineModule
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


def has_adapters(module: Any) -> bool:
    """Whether a module carries adapters of PEFT, active or not."""
    return bool(getattr(module, "peft_config", None))


def carry_over(part: str, source: nn.Module, module: EngineModule) -> None:
    """Give a new engine the adapters of the module that it stands for: an eager one, or another engine's."""
    held = source.adapters if isinstance(source, EngineModule) else source
    if held is not None and has_adapters(held):
        copy_adapters(held, adapters_of(part, module))
        announce(module)


def bring_back(module: EngineModule, eager: nn.Module) -> None:
    """Give an eager module the adapters that its engine has now, in place of its own."""
    if module.adapters is not None:
        recurse_remove_peft_layers(eager)
        for name in ("peft_config", "_hf_peft_config_loaded"):
            eager.__dict__.pop(name, None)
        copy_adapters(module.adapters, eager)


def copy_adapters(source: Any, target: Any) -> None:
    """Names, matrices, scales, and which are active or disabled: layer by layer, as they are."""
    layers = dict(lora_layers(source))
    for name, config in getattr(source, "peft_config", {}).items():
        config = copy.deepcopy(config)
        config.init_lora_weights = True  # others look at the weights of the layer, and change them
        state = {
            f"{path}.{half}.weight": getattr(layer, half)[name].weight.detach().clone()
            for path, layer in layers.items()
            for half in ("lora_A", "lora_B")
            if name in layer.lora_A
        }
        fill_adapter(target, name, state, config)
    placed = dict(lora_layers(target))
    for path, layer in layers.items():
        for name in ("scaling", "r", "lora_alpha", "use_rslora"):
            getattr(placed[path], name).update(getattr(layer, name))
        placed[path]._active_adapter = copy.copy(layer._active_adapter)
        placed[path]._disable_adapters = layer._disable_adapters
