"""LoRA on plugged pipelines: what diffusers and PEFT make of adapters, given to engines.

They do what they always do, on a copy of the module: its layers are there, its weights are not. What the active
adapters add up to then goes into the engine, on top of the bundle's own weights: any scale, several adapters, exact
removal. A teacher's LoRA goes through the layer map where the engine is a student's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LoraBaseMixin, _fetch_state_dict

from engines.lora.layers import adapters_of, announce
from engines.modules.base import LORA_PARTS, EngineModule
from sdkd.core.numbers import check_number
from sdkd.errors import EngineError, InputError
from sdkd.families import StudentSpec
from sdkd.students.blocks import recognised
from sdkd.students.lora_adapter import Adapter, fit_text, fit_unet
from sdkd.students.lora_fit import Fit, check_text_width
from sdkd.students.lora_layers import other_kind, read_layers

log = logging.getLogger(__name__)

_OTHERWISE = ". Were it the teacher's, rewrite it first: sdkd remap-lora FILE OUT --student {}"


class Adapters(LoraBaseMixin):
    """The adapters of a pipeline: for diffusers a pipeline of copies without weights, and of eager modules."""

    _lora_loadable_modules = LORA_PARTS

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
        adapters = self._fitted(state, settings or {}, f"LoRA {name!r}")  # all, before one is loaded
        if not adapters:
            raise InputError(f"LoRA {name!r} has no weights: give a LoRA's .safetensors file")
        there = self.get_list_adapters()
        if taken := [adapter.part for adapter in adapters if name in there.get(adapter.part, ())]:
            raise InputError(
                f"adapter name {name!r} is in use in the {taken[0]} already: choose another, or call "
                f"delete_adapters({name!r}) first"
            )
        for adapter in adapters:
            adapter.add_to(getattr(self, adapter.part), name)

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: Any = None) -> None:
        """Activate adapters with their scales, as diffusers does; InputError for a scale that is no finite number."""
        weights = adapter_weights if isinstance(adapter_weights, list) else [adapter_weights]
        for weight in (weight for weight in weights if weight is not None and not isinstance(weight, dict)):
            check_number("adapter_weights", weight)
        super().set_adapters(adapter_names, adapter_weights)

    def _free_name(self) -> str:
        taken = {name for names in self.get_list_adapters().values() for name in names}
        return next(name for name in (f"default_{number}" for number in range(len(taken) + 1)) if name not in taken)

    def _fitted(self, state: dict[str, Any], settings: dict[str, Any], what: str) -> list[Adapter]:
        """A file's weights as the parts of this pipeline take them; the log says whose they were."""
        unet: Any = self.unet
        config = dict(self.engines.get("unet", unet).config)
        check_text_width(state, config, what)
        layers = read_layers(state, what, settings)
        found = []
        for part, given in layers.items():
            if part == "unet":
                adapter, fit = fit_unet(given, config, settings, what)
                _log_owner(fit, recognised(config), len(given), what)
            else:
                adapter = fit_text(part, given, getattr(self, part, None), settings, what)
            found.append(adapter)
        return found

    def announce(self) -> None:
        """Tell the engines what the active adapters add; they take it at their next run."""
        for module in self.engines.values():
            announce(module)


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


def _log_owner(fit: Fit, spec: StudentSpec | None, layers: int, what: str) -> None:
    if spec is None:
        return
    log.log(
        logging.INFO if fit.sure else logging.WARNING,
        "%s is taken for one of %s%s, since %s; %d of its %d layers are kept%s",
        *(what, "the teacher of " if fit.owner == "teacher" else "", spec.name, fit.why),
        *(len(fit.state) // 2, layers, "" if fit.sure else _OTHERWISE.format(spec.short)),
    )
