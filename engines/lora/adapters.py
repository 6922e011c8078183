"""LoRA on plugged pipelines: what diffusers and PEFT make of adapters, given to engines.

They do what they always do, on a copy of the module: its layers are there, its weights are not. What the active
adapters add up to then goes into the engine, on top of the bundle's own weights: any scale, several adapters, exact
removal. A LoRA of SD 1.x/2.x goes through the layer map where the engine is a student's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_base import _fetch_state_dict
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer

from engines.lora.layers import adapters_of, announce, fill_adapter
from engines.modules.base import LORA_PARTS, EngineModule
from sdkd.core.numbers import check_number
from sdkd.errors import EngineError, InputError, ModelError
from sdkd.students.blocks import key_map, recognised, teacher_layout
from sdkd.students.lora_fit import Fit, check_text_width, fit_model, fit_student
from sdkd.students.lora_layers import (
    Layer,
    other_kind,
    peft_settings,
    peft_state,
    read_layers,
    remap_settings,
    text_names,
)

log = logging.getLogger(__name__)

_OTHERWISE = ". Were it the teacher's, rewrite it first: sdkd remap-lora FILE OUT --student {}"


class Adapters(StableDiffusionLoraLoaderMixin):
    """The adapters of a pipeline: for diffusers a pipeline of copies without weights, and of eager modules."""

    hf_device_map = None  # diffusers looks at these when it loads a LoRA into a pipeline
    components: Mapping[str, Any] = {}

    def __init__(self, pipe: Any) -> None:
        self.engines: dict[str, EngineModule] = {}
        for part in LORA_PARTS:
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

        EngineError for adapters of another kind (DoRA, LoHa, ...) and for `hotswap`; ModelError for a LoRA of another
        model, naming the widths or the weight; InputError for a name that is taken; what diffusers raises for files.
        """
        if hotswap:
            raise EngineError(
                "hotswap: an engine takes adapters of any rank, one after the other: call load_lora_weights after "
                "delete_adapters"
            )
        name = adapter_name or self._free_name()
        if "." in name:
            raise InputError(f"adapter name {name!r} has a dot, which PEFT reads as a path: give one without")
        state, settings = fetch(pretrained_model_name_or_path_or_dict, options)
        if kind := other_kind(state):
            raise EngineError(f"adapter {name!r} {kind}")
        fitted, settings = self._fitted(state, dict(settings or {}), f"LoRA {name!r}")
        parts = [part for part in LORA_PARTS if _of_part(fitted, part)]
        if not parts:
            raise InputError(f"LoRA {name!r} has no weights: give a LoRA's .safetensors file")
        there = self.get_list_adapters()
        if taken := [part for part in parts if name in there.get(part, ())]:
            raise InputError(
                f"adapter name {name!r} is in use in the {taken[0]} already: choose another, or call "
                f"delete_adapters({name!r}) first"
            )
        configs = {part: _config(settings, part, name) for part in parts}  # all, before one is loaded
        for part, config in configs.items():
            module, own = getattr(self, part), _of_part(fitted, part)
            if part == "text_encoder" and not hasattr(module, "text_model"):  # transformers 5
                own = {key.removeprefix("text_model."): value for key, value in own.items()}
            fill_adapter(module, name, own, config)

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: Any = None) -> None:
        """Activate adapters with their scales, as diffusers does; InputError for a scale that is no finite number."""
        weights = adapter_weights if isinstance(adapter_weights, list) else [adapter_weights]
        for weight in (weight for weight in weights if weight is not None and not isinstance(weight, dict)):
            check_number("adapter_weights", weight)
        super().set_adapters(adapter_names, adapter_weights)

    def _free_name(self) -> str:
        taken = {name for names in self.get_list_adapters().values() for name in names}
        return next(name for name in (f"default_{number}" for number in range(len(taken) + 1)) if name not in taken)

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


def _config(settings: Mapping[str, Any], part: str, name: str) -> LoraConfig:
    try:
        return LoraConfig(**_of_part(settings, part))
    except (TypeError, ValueError) as error:
        raise ModelError(f"LoRA {name!r} has settings that PEFT does not take ({error}): make it again") from error


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
    found = {
        name: layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
        for name, layer in module.named_modules()
    }
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
