"""LoRA on plugged pipelines: what diffusers and PEFT make of adapters, given to engines.

They do what they always do, on a hollow copy of the module: its layers are there, its weights are not. What the active
adapters add up to then goes into the engine, on top of the bundle's own weights: any scale, several adapters, exact
removal. A LoRA of SD 1.x/2.x goes through the layer map where the engine is a student's.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.utils import delete_adapter_layers
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import CLIPTextModel

from engines.adapters import PARTS
from engines.module import EngineModule
from engines.weights import Delta, EngineWeights
from sdkd.errors import EngineError, InputError, ModelError
from sdkd.lora_fit import Fit, check_text_width, fit_model, fit_student
from sdkd.lora_layers import Layer, peft_settings, peft_state, read_layers, text_names
from sdkd.lora_names import other_kind, remap_settings
from sdkd.numbers import check_number
from sdkd.students import key_map, meta_unet, recognised, teacher_layout

log = logging.getLogger(__name__)


_OTHERWISE = ". Were it the teacher's, rewrite it first: sdkd remap-lora FILE OUT --student {}"


def fill_adapter(module: Any, name: str, state: Mapping[str, torch.Tensor], config: Any) -> None:
    """Put one adapter into a module."""
    values = dict(state)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # several adapters are meant
        inject_adapter_in_model(config, module, name, low_cpu_mem_usage=True, state_dict=values)
    set_peft_model_state_dict(module, values, name, low_cpu_mem_usage=True)
    module._hf_peft_config_loaded = True


def hollow(module: nn.Module) -> nn.Module:
    """Give every parameter on the meta device a value that takes no memory: one zero, seen many times over.

    PEFT would move adapters to the meta device, to where their layers are.
    """
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            zeros = torch.zeros(()).expand(parameter.shape)
            part.register_parameter(name, nn.Parameter(zeros, requires_grad=False))
    return module.eval()


def hollow_copy(part: str, config: Any) -> nn.Module:
    """The eager module that an engine module of this config stands for, without weights."""
    if part == "unet":
        return hollow(meta_unet(dict(config)))
    from accelerate import init_empty_weights

    with init_empty_weights():
        empty = CLIPTextModel(config)
    return hollow(empty)


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
    """The hollow copy on which an engine module's adapters are kept: made once."""
    if module.adapters is None:
        object.__setattr__(module, "adapters", hollow_copy(part, module.config))  # no submodule: it has parameters
        module.add_module("lora_scale", LoraScale(module.weights))
    return module.adapters


class Adapters(StableDiffusionLoraLoaderMixin):
    """The adapters of a pipeline: for diffusers a pipeline of hollow modules, and of those that run eagerly."""

    hf_device_map = None  # diffusers looks at these when it loads a LoRA into a pipeline
    components: Mapping[str, Any] = {}

    def __init__(self, pipe: Any) -> None:
        self.engines: dict[str, EngineModule] = {}
        for part in PARTS:
            module = getattr(pipe, part, None)
            if isinstance(module, EngineModule):
                self.engines[part], module = module, adapters_of(part, module)
            setattr(self, part, module)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **options: Any,
    ) -> None:
        """Load a LoRA into all parts that it is for, or into none.

        EngineError for adapters of another kind (DoRA, LoHa, ...); ModelError for a LoRA of another model, naming the
        widths or the weight; InputError for a name that is taken; and what diffusers raises for files.
        """
        name = adapter_name or self._free_name()
        if "." in name:
            raise InputError(f"adapter name {name!r} has a dot, which PEFT reads as a path: give one without")
        state, settings = fetch(pretrained_model_name_or_path_or_dict, options)
        if kind := other_kind(state):
            raise EngineError(f"adapter {name!r} {kind}")
        fitted, settings = self._fitted(state, dict(settings or {}), f"LoRA {name!r}")
        parts = [part for part in PARTS if _of_part(fitted, part)]
        if not parts:
            raise InputError(f"LoRA {name!r} has no weights: give a LoRA's .safetensors file")
        before = self.get_list_adapters()
        if taken := [part for part in parts if name in before.get(part, ()) and not hotswap]:
            raise InputError(
                f"adapter name {name!r} is in use in the {taken[0]} already: choose another, or call "
                f"delete_adapters({name!r}) first"
            )
        try:
            for part in parts:
                self._load(part, fitted, settings, name, hotswap)
        except BaseException:
            self._drop(name, before)
            raise

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: Any = None) -> None:
        """Activate adapters with their scales, as diffusers does; InputError for a scale that is no finite number."""
        weights = adapter_weights if isinstance(adapter_weights, list) else [adapter_weights]
        for weight in (weight for weight in weights if weight is not None and not isinstance(weight, dict)):
            check_number("adapter_weights", weight)
        super().set_adapters(adapter_names, adapter_weights)

    def _load(self, part: str, state: Mapping[str, Any], settings: Mapping[str, Any], name: str, hotswap: bool) -> None:
        """Put one part of an adapter into its module."""
        module: Any = getattr(self, part)
        if hotswap:
            load = getattr(self, f"load_lora_into_{part}")
            load(state, network_alphas=None, adapter_name=name, metadata=settings, hotswap=True, **{part: module})
            return
        own, config = _of_part(state, part), _of_part(settings, part)
        if part == "text_encoder" and not hasattr(module, "text_model"):  # transformers 5
            own = {key.removeprefix("text_model."): value for key, value in own.items()}
        try:
            made = LoraConfig(**config)
        except (TypeError, ValueError) as error:
            raise ModelError(f"LoRA {name!r} has settings that PEFT does not take ({error}): make it again") from error
        fill_adapter(module, name, own, made)

    def _free_name(self) -> str:
        taken = {name for names in self.get_list_adapters().values() for name in names}
        return next(name for name in (f"default_{number}" for number in range(len(taken) + 1)) if name not in taken)

    def _drop(self, name: str, before: Mapping[str, list[str]]) -> None:
        """Take a half-loaded adapter out again."""
        for part, names in self.get_list_adapters().items():
            if name in names and name not in before.get(part, ()):
                delete_adapter_layers(getattr(self, part), name)

    def _fitted(self, state: dict[str, Any], settings: dict[str, Any], what: str) -> tuple[dict[str, Any], Any]:
        """A file's weights under PEFT's names, alphas inside, as the parts of this pipeline take them, and settings."""
        unet: Any = self.unet
        config = dict(self.engines.get("unet", unet).config)
        check_text_width(state, config, what)
        layers = read_layers(state, what, settings)
        found: dict[str, torch.Tensor] = {}
        if "unet" in layers:
            fit, settings = _fit_unet(layers["unet"], config, settings, what)
            found.update(fit.state)
        if "text_encoder" in layers:
            found.update(_fit_text(layers["text_encoder"], self.text_encoder, what))
        return found, peft_settings(found, settings)

    def announce(self) -> None:
        """Tell the engines what the active adapters add; they take it at their next run."""
        for module in self.engines.values():
            announce(module)


def _of_part(values: Mapping[str, Any], part: str) -> dict[str, Any]:
    prefix = f"{part}."
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def fetch(source: Any, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A LoRA's weights by the names that its file has, and settings, from wherever diffusers reads them."""
    if isinstance(source, dict):
        return dict(source), None
    if Path(source).suffix in (".safetensors", ".bin") and not Path(source).is_file():  # diffusers asks the hub for it
        raise InputError(f"LoRA {str(source)!r} does not exist: give a file, a folder or a hub id")
    known = (
        "weight_name",
        "local_files_only",
        "cache_dir",
        "force_download",
        "proxies",
        "token",
        "revision",
        "subfolder",
    )
    safe = options.get("use_safetensors")
    state, settings = _fetch_state_dict(
        pretrained_model_name_or_path_or_dict=source,
        use_safetensors=True if safe is None else safe,
        allow_pickle=safe is None,
        user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
        **{name: options.get(name) for name in known},
    )
    return state, settings


def _fit_unet(
    layers: Mapping[str, Layer], config: dict[str, Any], settings: dict[str, Any], what: str
) -> tuple[Fit, dict[str, Any]]:
    spec = recognised(config)
    if spec is None:
        return fit_model(layers, config, what), settings
    teacher = teacher_layout(config)
    fit = fit_student(layers, config, teacher, spec, what, unclear="model")
    if fit.owner == "teacher":
        settings = remap_settings(settings, key_map(teacher, spec))
    log.log(
        logging.INFO if fit.sure else logging.WARNING,
        "%s is taken for one of %s%s, since %s; %d of its %d layers are kept%s",
        *(what, "the teacher of " if fit.owner == "teacher" else "", spec.name, fit.why),
        *(len(fit.state) // 2, len(layers), "" if fit.sure else _OTHERWISE.format(spec.short)),
    )
    return fit, settings


def _fit_text(layers: Mapping[str, Layer], module: Any, what: str) -> dict[str, torch.Tensor]:
    """A text encoder's layers under PEFT's names; ModelError when they are not this one's, or of other widths."""
    if module is None:
        raise ModelError(f"{what} has {len(layers)} layers for a text encoder, and this pipeline has none")
    found = {name: layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
             for name, layer in module.named_modules()}  # fmt: skip
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
    return peft_state("text_encoder", layers, text_names(layers))


def lora_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of a module that have adapters, by path."""
    return ((path, layer) for path, layer in module.named_modules() if isinstance(layer, LoraLayer))


def announce(module: EngineModule) -> None:
    """Tell an engine what its active adapters add; it takes it at its next run."""
    if module.adapters is not None:
        module.weights.add(active_deltas(module.adapters))


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
