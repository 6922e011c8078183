"""The adapter methods of a single module, on its engine: called on the copy of the eager one that holds the adapters.

`pipe.unet.add_adapter(config)` and its like do what diffusers' and transformers' mixins do, and the engine takes what
then is active at its next run. A call that adds works on a second copy, which takes the first one's place when all went
well, so that nothing changes where it fails.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft import PeftConfig

from engines.lora.layers import adapters_of, announce, copy_adapters, copy_without_weights, hold, kind_of
from engines.modules.base import EAGERLY, EngineModule
from sdkd.errors import EngineError

ADDING = ("add_adapter", "load_lora_adapter", "load_adapter")
DRAWN = ("gaussian", "orthogonal")  # ways to fill an adapter that look at no weight of the layer


def call_held(module: EngineModule, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Call a method of the eager module on the copy that holds its adapters, and tell the engine what is active.

    EngineError for adapters that an engine does not take and for `hotswap`; otherwise what the method raises.
    """
    part = module.session.checked.record.component
    if name not in ADDING:
        result = getattr(adapters_of(part, module), name)(*arguments, **options)
        announce(module)
        return result
    if options.get("hotswap"):
        raise EngineError(f"{name}(hotswap=True): engines take adapters of any rank: delete the other one first")
    _check_filling(name, (*arguments, *options.values()))
    trial = copy_without_weights(part, module.config)
    if getattr(module.adapters, "peft_config", None):
        copy_adapters(module.adapters, trial)
    result = getattr(trial, name)(*arguments, **options)
    for path, layer in trial.named_modules():
        if kind := kind_of(layer):
            raise EngineError(
                f"{type(module).__name__}.{name}: engines take plain LoRA, an up and a down matrix for a layer, and "
                f"{path} would have something else ({kind}). Leave it out, or {EAGERLY}"
            )
    hold(module, trial)
    announce(module)
    return result


def _check_filling(name: str, values: Iterable[Any]) -> None:
    """EngineError for a config whose adapters begin with a part of the layers' weights, which are not there."""
    for config in (value for value in values if isinstance(value, PeftConfig)):
        way = getattr(config, "init_lora_weights", True)
        if isinstance(way, str) and way.lower() not in DRAWN:
            raise EngineError(
                f"{name}: init_lora_weights={way!r} takes the layers' weights apart, and those are the engine's: give "
                f"True, False or one of {', '.join(DRAWN)}, or {EAGERLY}"
            )
