"""LoRA on plugged pipelines: what diffusers and PEFT make of adapters, given to engines.

They do what they always do, on a hollow copy of the module: its layers are there, its weights are not. What the active
adapters add up to then goes into the engine, on top of the bundle's own weights: any scale, several adapters, exact
removal. A LoRA of SD 1.x/2.x goes through the layer map where the engine is a student's.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft import inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import CLIPTextModel

from engines.adapters import PARTS
from engines.module import EngineModule
from engines.weights import Delta
from sdkd.errors import EngineError, ModelError
from sdkd.lora_names import remap_settings
from sdkd.students import key_map, meta_unet, recognised, remap_lora, teacher_layout

log = logging.getLogger(__name__)


class HollowTextEncoder(CLIPTextModel):
    """A CLIPTextModel without weights, whose adapters PEFT loads: transformers would initialise what is missing."""

    def load_adapter(self, adapter_name: str, adapter_state_dict: Mapping[str, torch.Tensor], peft_config: Any,
                     **_: Any) -> None:  # fmt: skip
        """Inject and fill one adapter."""
        inject_adapter_in_model(peft_config, self, adapter_name, low_cpu_mem_usage=True)
        set_peft_model_state_dict(self, dict(adapter_state_dict), adapter_name, low_cpu_mem_usage=True)
        self._hf_peft_config_loaded = True


def hollow(module: nn.Module) -> nn.Module:
    """Give every parameter on the meta device a value that takes no memory: one zero, seen many times over.

    PEFT would move adapters to the meta device, to where their layers are.
    """
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            zeros = torch.zeros(()).expand(parameter.shape)
            part.register_parameter(name, nn.Parameter(zeros, requires_grad=False))
    return module.eval()


def hollow_copy(part: str, module: EngineModule) -> nn.Module:
    """The eager module that an engine module stands for, without weights."""
    if part == "unet":
        return hollow(meta_unet(dict(module.config)))
    from accelerate import init_empty_weights

    with init_empty_weights():
        empty = HollowTextEncoder(module.config)
    return hollow(empty)


class Adapters(StableDiffusionLoraLoaderMixin):
    """The adapters of one pipeline: for diffusers a pipeline of hollow modules, and of those that run eagerly."""

    hf_device_map = None  # diffusers looks at these when it loads a LoRA into a pipeline
    components: Mapping[str, Any] = {}

    def __init__(self, engines: Mapping[str, EngineModule], eager: Mapping[str, nn.Module | None]) -> None:
        self.engines = dict(engines)
        for part in PARTS:
            setattr(self, part, hollow_copy(part, engines[part]) if part in engines else eager.get(part))

    def lora_state_dict(self, *arguments: Any, **options: Any) -> Any:
        """A LoRA file's weights, alphas and settings; for a student's UNet, those of a teacher's by the layer map."""
        options.pop("unet_config", None)
        state, alphas, settings = StableDiffusionLoraLoaderMixin.lora_state_dict(*arguments, **options)
        if "unet" not in self.engines:
            return state, alphas, settings
        return fitted(dict(self.engines["unet"].config), state, alphas, settings)

    def announce(self) -> None:
        """Tell the engines what the active adapters add; they take it at their next run."""
        for part, module in self.engines.items():
            module.weights.add(active_deltas(getattr(self, part)))


def active_deltas(module: nn.Module) -> dict[str, Delta]:
    """What the active adapters of a module add, by name of the weight. EngineError for a DoRA."""
    found: dict[str, Delta] = {}
    for path, layer in module.named_modules():
        if not isinstance(layer, LoraLayer) or layer.disable_adapters:
            continue
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if any(layer.use_dora.get(name) for name in names):
            raise EngineError(f"adapter {names[0]!r} is a DoRA, which engines do not take: run it eagerly")
        if names:
            found[f"{path}.weight"] = functools.partial(_total, layer, names)
    return found


def _total(layer: Any, names: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([layer.get_delta_weight(name).float() for name in names]).sum(0)


def fitted(config: Mapping[str, Any], state: dict[str, Any], alphas: Any, settings: Any) -> tuple[Any, Any, Any]:
    """A LoRA for a UNet of this config: as it is when it names its layers, else by the layer map from the teacher's."""
    spec = recognised(config)
    modules = {name for name, _ in meta_unet(dict(config)).named_modules()}
    foreign = [key for key in state if key.startswith("unet.") and not _fits(key.removeprefix("unet."), modules)]
    if spec is None or not foreign:
        return state, alphas, settings
    teacher = teacher_layout(config)
    kept = remap_lora(state, teacher, spec)
    log.info("a LoRA of the teacher: %d of its %d weights fit %s", len(kept), len(state), spec.name)
    return (
        kept,
        _remapped_alphas(alphas, teacher, spec),
        remap_settings(settings, key_map(teacher, spec)) if settings else settings,
    )


def _fits(key: str, modules: set[str]) -> bool:
    parts = key.split(".")
    return any(".".join(parts[:length]) in modules for length in range(len(parts) - 1, 1, -1))


def _remapped_alphas(alphas: Any, teacher: Mapping[str, Any], spec: Any) -> Any:
    if not alphas:
        return alphas
    try:
        return remap_lora(alphas, teacher, spec)
    except ModelError:  # alphas of a text encoder alone
        return alphas
