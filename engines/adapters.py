"""The LoRA methods of a plugged pipeline: diffusers' own names, done by `engines.lora` on first use."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sdkd.errors import EngineError

if TYPE_CHECKING:
    from engines.lora import Adapters
    from engines.module import EngineModule

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
PARTS = ("unet", "text_encoder")


class LoraMethods:
    """The methods of one pipeline; its adapters are made when the first one is loaded."""

    def __init__(self, pipe: Any, engines: Mapping[str, EngineModule]) -> None:
        self._pipe = weakref.ref(pipe)  # whose methods hold this: engines are freed as soon as the pipeline is
        self.engines = {part: engines[part] for part in PARTS if part in engines}
        self._adapters: Adapters | None = None

    @property
    def pipe(self) -> Any:
        """The pipeline whose methods these are."""
        return self._pipe()

    def install(self) -> None:
        """Put the methods on the pipeline object, over its class's."""
        for name in (*METHODS, *REFUSED):
            if hasattr(type(self.pipe), name):
                self.pipe.__dict__[name] = self._refused(name) if name in REFUSED else self._method(name)

    def remove(self) -> None:
        """Give the pipeline its class's methods back."""
        for name in (*METHODS, *REFUSED):
            self.pipe.__dict__.pop(name, None)

    def _method(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            from engines.lora import Adapters

            if self._adapters is None:
                eager = {part: getattr(self.pipe, part, None) for part in PARTS if part not in self.engines}
                self._adapters = Adapters(self.engines, eager)
            result = getattr(self._adapters, name)(*arguments, **options)
            self._adapters.announce()
            return result

        call.__name__, call.__doc__ = name, f"diffusers' `{name}`, on engines."
        return call

    def _refused(self, name: str) -> Any:
        def call(*_: Any, **__: Any) -> Any:
            raise EngineError(f"{name}: {REFUSED[name]}. Leave it out, or run eagerly: engines.unplug(pipe)")

        return call
