"""The LoRA methods of pipelines whose UNet or text encoder is an engine: diffusers' own names, done by `.adapters`.

Adapters belong to a pipeline's parts: each engine module keeps its own. So the methods of diffusers' class are what is
extended, once, and they look at the parts that a pipeline has when they are called: after a second plug, on a copy
(`from_pipe`, `pipeline(**pipe.components)`), after a part was replaced by hand. A pipeline without such an engine runs
diffusers' code alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sdkd.errors import EngineError

# Methods of StableDiffusionLoraLoaderMixin that change or show adapters.
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


@functools.cache
def install() -> None:
    """Extend diffusers' methods; which one runs depends on the pipeline's parts."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    for name in (*METHODS, *REFUSED):
        original = getattr(StableDiffusionLoraLoaderMixin, name, None)
        if original is not None:
            setattr(StableDiffusionLoraLoaderMixin, name, _extended(name, original))


def _extended(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(pipe: Any, *arguments: Any, **options: Any) -> Any:
        if not on_engines(pipe):
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


def on_engines(pipe: Any) -> bool:
    """Whether adapters of this pipeline change an engine."""
    from engines.modules.base import LORA_PARTS, EngineModule

    return any(isinstance(getattr(pipe, part, None), EngineModule) for part in LORA_PARTS)


# What `plug` asks of adapters; PEFT is imported only where there are some.


def check(part: str, module: Any) -> None:
    """ModelError naming an adapter of an eager module that an engine cannot take over."""
    if hasattr(module, "peft_config"):
        from engines.lora.carried import check_adapters

        check_adapters(part, module)


def carry_over(part: str, source: Any, module: Any) -> None:
    """Give a new engine the adapters of the module that it stands for."""
    from engines.modules.base import LORA_PARTS

    if part in LORA_PARTS and (hasattr(source, "peft_config") or getattr(source, "adapters", None) is not None):
        from engines.lora.carried import carry_over

        carry_over(part, source, module)
