"""A LoRA as adapters of PEFT: fitted to a pipeline's parts, put into a module, taken off, fused into its weights.

PEFT, an extra, is imported where there are adapters.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sdkd.errors import ModelError
from sdkd.students.blocks import key_map, recognised, teacher_layout
from sdkd.students.lora_fit import Fit, fit_model, fit_student
from sdkd.students.lora_layers import Layer, peft_settings, remap_settings, text_state

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Adapter:
    """What a LoRA changes in one part of a pipeline: weights under PEFT's names there, and PEFT's LoraConfig."""

    part: str
    state: Mapping[str, torch.Tensor]
    config: Any

    @staticmethod
    def of(part: str, state: Mapping[str, torch.Tensor], settings: Mapping[str, Any], what: str) -> Adapter:
        """Of fitted weights and their file's settings (`unet.r`, ...); ModelError for settings that PEFT refuses."""
        from peft import LoraConfig

        try:
            config = LoraConfig(**_of_part(peft_settings(state, settings), part))
        except (TypeError, ValueError) as error:
            raise ModelError(f"{what} has settings that PEFT does not take ({error}): make it again") from error
        return Adapter(part, _of_part(state, part), config)

    def add_to(self, module: Any, name: str) -> None:
        """Put it into its part's module, active, under a name that is free there."""
        state = dict(self.state)
        if self.part != "unet" and not hasattr(module, "text_model"):  # transformers 5
            state = {key.removeprefix("text_model."): value for key, value in state.items()}
        fill_adapter(module, name, state, self.config)

    def fuse_into(self, module: Any, scale: float) -> None:
        """Add it, multiplied by `scale`, to the weights of its part's module, which has no other adapters."""
        whole = {name: weight.float() for name, weight in self.state.items()}  # rounded once, in the sum
        replace(self, state=whole).add_to(module, "fused")
        for _, layer in lora_layers(module):
            layer.scale_layer(scale)
            layer.merge()
        remove_adapters(module)


def _of_part(values: Mapping[str, Any], part: str) -> dict[str, Any]:
    prefix = f"{part}."
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def fit_unet(
    layers: Mapping[str, Layer], config: Mapping[str, Any], settings: Mapping[str, Any], what: str
) -> tuple[Adapter, Fit]:
    """A LoRA's layers for the UNet of a config: its own, or by the layer map its teacher's where it is a student.

    ModelError when they are of another model.
    """
    spec = recognised(config)
    if spec is None:
        fit = fit_model(layers, config, what)
    else:
        teacher = teacher_layout(config)
        fit = fit_student(layers, config, teacher, spec, what, unclear="model")
        if fit.owner == "teacher":
            settings = remap_settings(settings, key_map(teacher, spec))
    return Adapter.of("unet", fit.state, settings, what), fit


def fit_text(part: str, layers: Mapping[str, Layer], module: Any, settings: Mapping[str, Any], what: str) -> Adapter:
    """A LoRA's layers for a text encoder, a `part` of a pipeline.

    ModelError when they are not this one's, or of other widths.
    """
    if module is None:
        raise ModelError(f"{what} has {len(layers)} layers for the {part}, and this pipeline has none")
    found = {name: getattr(layer, "base_layer", layer) for name, layer in module.named_modules()}
    here = {name.removeprefix("text_model.").removeprefix("encoder."): layer for name, layer in found.items()}
    for name, layer in layers.items():
        if name not in here:
            raise ModelError(
                f"{what} names {layer.name!r}, a layer that this text encoder lacks: it is for another one"
            )
        if (shape := tuple(here[name].weight.shape)) != layer.widths:
            sizes = [" x ".join(map(str, size)) for size in (layer.widths, shape)]
            raise ModelError(
                f"{what} is for a text encoder of other widths: {layer.name!r} is for a layer of {sizes[0]}, "
                f"this one's is {sizes[1]}. Give a LoRA that was made for this model"
            )
    return Adapter.of(part, text_state(part, layers), settings, what)


# Adapters in modules


def fill_adapter(module: Any, name: str, state: Mapping[str, torch.Tensor], config: Any) -> None:
    """Put one adapter into a module."""
    from peft import inject_adapter_in_model, set_peft_model_state_dict

    values = dict(state)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # several adapters are meant
        inject_adapter_in_model(config, module, name, low_cpu_mem_usage=True, state_dict=values)
    set_peft_model_state_dict(module, values, name, low_cpu_mem_usage=True)
    module._hf_peft_config_loaded = True


def lora_layers(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of a module that have adapters, by path."""
    from peft.tuners.lora.layer import LoraLayer

    return ((path, layer) for path, layer in module.named_modules() if isinstance(layer, LoraLayer))


def remove_adapters(module: Any) -> None:
    """Take all adapters off a module; what is fused into its weights stays there."""
    from diffusers.utils import recurse_remove_peft_layers

    recurse_remove_peft_layers(module)
    for name in ("peft_config", "_hf_peft_config_loaded"):
        module.__dict__.pop(name, None)
