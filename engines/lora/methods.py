"""What pipelines on engines need of LoRA before there is one: PEFT, an extra, is imported where there are adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from transformers import CLIPTextModel

from engines.modules.base import LORA_PARTS, EngineModule
from engines.modules.components import EngineTextEncoder, EngineUNet
from sdkd.errors import EngineError

MIXINS = (StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin)  # of the families' pipelines
# Methods of these that change or show adapters.
METHODS = (
    *("load_lora_weights", "unload_lora_weights", "set_adapters", "delete_adapters", "disable_lora", "enable_lora"),
    *("get_active_adapters", "get_list_adapters"),
)
REFUSED = {
    "fuse_lora": "adapters are part of the engine's weights already",
    "unfuse_lora": "adapters are part of the engine's weights; set_adapters and unload_lora_weights change that",
    "enable_lora_hotswap": "an engine takes adapters of any rank, one after the other: call load_lora_weights",
    "set_lora_device": "adapters stay on the CPU until they are added to the engine's weights",
}
# Methods of a single module, diffusers' or transformers', and what both keep about adapters.
MODULE_METHODS = (
    *("add_adapter", "load_adapter", "load_lora_adapter", "set_adapter", "set_adapters", "delete_adapter"),
    *("delete_adapters", "disable_adapters", "enable_adapters", "disable_lora", "enable_lora", "unload_lora"),
    *("active_adapters", "get_adapter_state_dict", "save_lora_adapter"),
)
HELD = ("peft_config", "_hf_peft_config_loaded")


@functools.cache
def extend_lora() -> None:
    """Let diffusers' methods do what `Adapters` does where a pipeline's UNet or text encoder is an engine, then.

    The methods of diffusers' class are extended, once, and look at the parts that a pipeline has when they are called:
    after a second plug, on a copy (`from_pipe`), after a part was replaced by hand.
    """
    for mixin in MIXINS:
        for name in (*METHODS, *REFUSED):
            original = getattr(mixin, name, None)
            if original is not None:
                setattr(mixin, name, _extended(name, original))
    for kind, eager in ((EngineUNet, UNet2DConditionModel), (EngineTextEncoder, CLIPTextModel)):
        for name in (name for name in MODULE_METHODS if hasattr(eager, name)):
            setattr(kind, name, _on_adapters(name, getattr(eager, name)))
        for name in HELD:
            setattr(kind, name, property(functools.partial(_held, name)))


def _extended(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(pipe: Any, *arguments: Any, **options: Any) -> Any:
        if not any(isinstance(getattr(pipe, part, None), EngineModule) for part in LORA_PARTS):
            return original(pipe, *arguments, **options)
        if name in REFUSED:
            raise EngineError(f"{name}: {REFUSED[name]}. Leave it out, or run eagerly: engines.unplug(pipe)")
        from engines.lora.adapters import Adapters

        adapters = Adapters(pipe)
        result = getattr(adapters, name)(*arguments, **options)
        if not name.startswith("get_"):
            adapters.announce()
        return result

    return call


def _on_adapters(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(module: EngineModule, *arguments: Any, **options: Any) -> Any:
        from engines.lora.modules import call_held

        return call_held(module, name, arguments, options)

    return call


def _held(name: str, module: EngineModule) -> Any:
    """What the copy of an engine module with its adapters knows of them; AttributeError where there are none."""
    return getattr(module.adapters, name)


def check_adapters(part: str, module: Any) -> None:
    """ModelError naming an adapter of an eager module that an engine cannot take over."""
    if not isinstance(module, EngineModule) and getattr(module, "peft_config", None):
        from engines.lora.layers import check_adapters

        check_adapters(part, module)


def carry_over(part: str, source: Any, module: EngineModule) -> None:
    """Give a new engine the adapters of the module that it stands for: an eager one, or another engine's."""
    held = source.adapters if isinstance(source, EngineModule) else source
    if part in LORA_PARTS and getattr(held, "peft_config", None):
        from engines.lora.layers import adapters_of, announce, copy_adapters

        copy_adapters(held, adapters_of(part, module))
        announce(module)
