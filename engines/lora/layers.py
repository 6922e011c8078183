"""The adapters of an engine module: held on a copy of the eager module that has layers and no weights.

PEFT does there what it always does; what the active adapters add up to goes into the engine, on top of its own weights.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from engines.modules.base import EngineModule
from engines.sessions.weights import Delta, EngineWeights
from sdkd.errors import ModelError
from sdkd.students.blocks import meta_unet
from sdkd.students.lora_adapter import fill_adapter, lora_layers, remove_adapters


def without_weights(module: nn.Module) -> nn.Module:
    """Give every parameter on the meta device a value that takes no memory: one zero, seen many times over.

    PEFT would move adapters to the meta device, to where their layers are.
    """
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            zeros = torch.zeros(()).expand(parameter.shape)
            part.register_parameter(name, nn.Parameter(zeros, requires_grad=False))
    return module.eval()


def copy_without_weights(part: str, config: Any) -> nn.Module:
    """The eager module that an engine module of this config stands for, without weights."""
    if part == "unet":
        return without_weights(meta_unet(dict(config)))
    from accelerate import init_empty_weights

    kind = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}[part]
    with init_empty_weights():
        empty = kind(config)
    return without_weights(empty)


class LoraScale(nn.Module, BaseTunerLayer):
    """Takes the factor of `encode_prompt(lora_scale=...)`: diffusers scales the adapter layers that a module has."""

    def __init__(self, weights: EngineWeights) -> None:
        super().__init__()
        self.weights = weights

    def scale_layer(self, scale: float) -> None:
        """Multiply what the active adapters add, until it is unscaled."""
        self.weights.scale(scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Back to the scales that `set_adapters` gave."""
        self.weights.scale(1.0)

    def set_scale(self, adapter: str, scale: float) -> None:
        """What diffusers calls to undo a factor of 0."""
        self.weights.scale(1.0)


def adapters_of(part: str, module: EngineModule) -> Any:
    """The copy without weights on which an engine module's adapters are kept: made once."""
    if module.adapters is None:
        hold(module, copy_without_weights(part, module.config))
    return module.adapters


def hold(module: EngineModule, held: nn.Module) -> None:
    """Let this copy without weights be the one that holds an engine module's adapters."""
    if module.adapters is None:
        module.register_state_dict_post_hook(_add_matrices)
    object.__setattr__(module, "adapters", held)  # no submodule: it has parameters
    object.__setattr__(module, "bring_back", functools.partial(bring_back, held))


def _add_matrices(module: Any, state: dict[str, Any], prefix: str, metadata: object) -> None:
    """The adapters' matrices belong to a module's state, from which PEFT saves them."""
    state.update({prefix + name: value for name, value in module.adapters.state_dict().items() if ".lora_" in name})


def announce(module: EngineModule) -> None:
    """Tell an engine what its active adapters add; it takes it at its next run."""
    if module.adapters is None:
        return
    module.weights.add(active_deltas(module.adapters))
    if not getattr(module.adapters, "peft_config", None):
        module._modules.pop("lora_scale", None)
    elif "lora_scale" not in module._modules:
        module.add_module("lora_scale", LoraScale(module.weights))


def active_deltas(module: nn.Module) -> dict[str, Delta]:
    """What the active adapters of a module add, by name of the weight."""
    found: dict[str, Delta] = {}
    for path, layer in lora_layers(module):
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if names and not layer.disable_adapters:
            found[f"{path}.weight"] = functools.partial(_total, layer, names)
    return found


def _total(layer: Any, names: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([layer.get_delta_weight(name).float() for name in names]).sum(0)


def bring_back(held: nn.Module, eager: nn.Module) -> None:
    """Give an eager module the adapters that are held now, in place of its own."""
    remove_adapters(eager)
    copy_adapters(held, eager)


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


# Adapters that move with a part of a pipeline: from an eager module to its engine, and to the next engine


def check_adapters(part: str, module: nn.Module) -> None:
    """ModelError naming an adapter of an eager module with some that an engine cannot take over."""
    for path, layer in module.named_modules():
        where = f"{part}.{path}"
        if merged := getattr(layer, "merged_adapters", None):
            raise ModelError(
                f"the adapter {merged[0]!r} is fused into {where}, and a bundle has weights of its own: call "
                "pipe.unfuse_lora() first, and it is carried over to the engine; or call pipe.unload_lora_weights(), "
                "which leaves it in the weights, and export this pipeline"
            )
        if kind := kind_of(layer):
            raise ModelError(
                f"{where} has an adapter that engines do not take ({kind}): fuse it (pipe.fuse_lora(), "
                "pipe.unload_lora_weights()) and export this pipeline, or unload it"
            )


def kind_of(layer: Any) -> str | None:
    """What makes an adapter's layer more than an up and a down matrix; None for plain LoRA, and for no adapter."""
    if not isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
        return None
    if isinstance(layer, AuxiliaryTrainingWrapper):
        return f"a whole layer, {type(layer).__name__}"
    if not isinstance(layer, LoraLayer):
        return type(layer).__module__.removeprefix("peft.tuners.").split(".")[0]
    if any(layer.use_dora.values()):
        return "DoRA"
    if any(layer.lora_bias.values()) or layer.lora_embedding_A or getattr(layer, "lora_variant", None):
        return "LoRA with biases, of an embedding or of a variant"
    return None if isinstance(layer.get_base_layer(), nn.Linear | nn.Conv2d) else type(layer).__name__
