"""Where the modules to export come from: a named model, loaded part by part, or an eager pipeline, left as it is."""

from __future__ import annotations

import copy
import functools
import gc
import hashlib
import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from export.graph.components import LastLayer, component_module, component_state
from sdkd.core.components import CACHED_UNET, CONFIG_FOLDERS
from sdkd.core.conditions import Extras
from sdkd.core.contract import vae_scale
from sdkd.core.files import write_json
from sdkd.errors import InputError
from sdkd.families import Family, family_of_pipeline, family_of_unet
from sdkd.models.diffusers_folder import digest, write_tokenizer_files
from sdkd.models.exportable import check_configs, check_extra_parts, check_guidance, module_config
from sdkd.models.families import EXPORTED, check_exported, empty
from sdkd.models.fused import (
    LORAS,
    FusedSource,
    Lora,
    Loras,
    check_loras,
    fuse,
    generation_of,
    loras_of,
    parse_loras,
    with_loras,
)
from sdkd.models.generation import Generation, implied
from sdkd.models.ip_adapter import image_layers
from sdkd.models.ip_adapter_file import IpAdapter, add_to
from sdkd.models.replacements import (
    WithVae,
    absolute,
    check_vae,
    check_whole,
    load_replacement,
    replacement_class,
    replacement_config,
    replacement_digests,
    with_vae,
)
from sdkd.models.resolve import Model, load_component, load_rest, resolve
from sdkd.models.schedulers import check_schedule, use_scheduler
from sdkd.models.source import ModelSource
from sdkd.models.step_caching import check_cachable

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@dataclass
class Source:
    """Modules by part, what the manifest says of them, and whether they are ours to change."""

    about: dict[str, Any]
    rest: Any  # the pipeline, without its weights where the model has a name
    model: ModelSource | None = None
    dtype: torch.dtype = torch.float32
    replaced: Mapping[str, str] = field(default_factory=dict)  # part -> folder or hub id
    generation: Generation | None = None  # how the model is to be run, where that is known
    digests: Mapping[str, str] = field(default_factory=dict)
    loras: tuple[Lora, ...] = ()  # to fuse into a pipeline's modules; those of a named model are its own
    step_caching: bool = False
    ip_adapters: tuple[IpAdapter, ...] = ()  # to load into the UNet
    _loaded: dict[str, nn.Module] = field(default_factory=dict)
    _hashed: dict[str, str] = field(default_factory=dict)

    @property
    def components(self) -> tuple[str, ...]:
        """What this source has to export."""
        has_controlnet = "controlnet" in self.replaced or getattr(self.rest, "controlnet", None) is not None
        more = {CACHED_UNET: self.step_caching, "controlnet": has_controlnet}
        return (*self.family.components, *(name for name, there in more.items() if there))

    @property
    def t2i_adapter(self) -> bool:
        """Whether it is a pipeline with a T2I-Adapter, which stays eager beside the UNet."""
        return getattr(self.rest, "adapter", None) is not None

    @property
    def image_tokens(self) -> int:
        """Hidden states that an image encoder gives for an image: its own's, or CLIP's."""
        config = getattr(getattr(self.rest, "image_encoder", None), "config", None)
        return Extras.image_tokens if config is None else (config.image_size // config.patch_size) ** 2 + 1

    @property
    def family(self) -> Family:
        """The family of its model, or of the pipeline's class."""
        if self.model is not None:
            return self.model.family
        named = family_of_pipeline(type(self.rest).__name__)
        return named or family_of_unet(self._own_config("unet") or {})

    def module(self, component: str) -> nn.Module:
        """The PyTorch module of a component, loaded on first use; ModelError as the loaders raise it."""
        if component == CACHED_UNET:
            return LastLayer(self.module("unet"))
        part = CONFIG_FOLDERS[component]
        if part in self.replaced:
            if part not in self._loaded:
                self._loaded[part] = load_replacement(part, self.replaced[part], self.dtype)
            return self._loaded[part]
        adapters = self.ip_adapters if part == "unet" else ()
        if self.model is None and not adapters and not any(part in lora.parts for lora in self.loras):
            return component_module(self.rest, component)
        if part not in self._loaded and self.model is None:  # the caller's pipeline stays as it is
            own = fuse(part, copy.deepcopy(component_module(self.rest, component)), self.loras)
            self._loaded[part] = add_to(own, adapters)
        elif part not in self._loaded:
            self._loaded[part] = add_to(load_component(self.model, part, self.dtype), adapters)  # type: ignore[arg-type]
        return self._loaded[part]

    def check(self, components: Sequence[str]) -> None:
        """ModelError or ExportError, before weights are read, for what would not run as these components' engines."""
        if (scheduler := getattr(self.rest, "scheduler", None)) is not None:
            check_schedule(scheduler)
        if self.step_caching:
            check_cachable(self._config("unet") or {}, self.generation, controlnet="controlnet" in self.components)
            if self.ip_adapters or image_layers(getattr(self.rest, "unet", None)):
                raise InputError("step caching does not go with an IP-Adapter, which its last layer has: leave one out")
        if "vae" in self.replaced and (unet := self._own_config("unet")) and (own := self._own_config("vae")):
            check_vae(self.replaced["vae"], unet, own)
        parts = dict.fromkeys(CONFIG_FOLDERS[name] for name in self.components)
        check_configs({part: config for part in parts if (config := self._config(part)) is not None})
        if self.model is None:
            check_extra_parts(self.rest)
            check_guidance(type(self.rest).__name__, self._config("unet") or {}, "the pipeline")
            for component in components:
                if CONFIG_FOLDERS[component] not in self.replaced:
                    component_module(self.rest, component)

    def _config(self, part: str) -> dict[str, Any] | None:
        if part in self.replaced:
            return replacement_config(part, self.replaced[part])
        return self._own_config(part)

    def outline(self, part: str) -> nn.Module | None:
        """A part's module without its weights, or the caller's own; None for one whose config is not known."""
        if self.model is None and part not in self.replaced:
            own: nn.Module | None = getattr(self.rest, part, None)
            return own
        config = self._config(part)
        if not config:
            return None
        kind = replacement_class(part, self.replaced[part]) if part in self.replaced else self.rest.config[part][1]
        made: nn.Module = empty(part, config, kind)
        return made

    def _own_config(self, part: str) -> dict[str, Any] | None:
        if self.model is not None:
            return self.model.config(part) or None
        module: Any = getattr(self.rest, part, None)
        return module_config(module) if hasattr(module, "config") else None  # several ControlNets have none

    @functools.cached_property
    def geometry(self) -> tuple[int, int]:
        """Pixels per latent, and tokens that the text encoder takes at once."""
        found = vae_scale(module_config(self.module("vae_decoder")))
        self.release("vae_decoder")
        positions = int(module_config(self.module("text_encoder"))["max_position_embeddings"])
        self.release("text_encoder")
        return found, positions

    def release(self, component: str) -> None:
        """Forget a component's module."""
        self._loaded.pop(CONFIG_FOLDERS[component], None)
        gc.collect()

    def is_ours(self, component: str) -> bool:
        """Whether a component's module may be changed in place."""
        return CONFIG_FOLDERS[component] in self._loaded

    def digest(self, component: str) -> str:
        """SHA-256 of the weights at their source, or of the module's state where they have no file; of a UNet with
        those of its IP-Adapters.
        """
        found, adapters = self._digest(component), self.ip_adapters if component == "unet" else ()
        return digest(" ".join((found, *(adapter.sha256 for adapter in adapters)))) if adapters else found

    def _digest(self, component: str) -> str:
        component = "unet" if component == CACHED_UNET else component
        part = CONFIG_FOLDERS[component]
        if part not in self.replaced and component in self.digests:
            return self.digests[component]
        if component in self._hashed:  # asked for twice, and all of the weights are read
            return self._hashed[component]
        if part in self.replaced:
            self._hashed |= replacement_digests(part, self.replaced[part])
        else:
            self._hashed[component] = state_digest(component_state(component, self.module(component)))
        return self._hashed[component]

    def write_rest(self, folder: Path) -> None:
        """What runs beside the graphs, as diffusers writes it: model_index.json, scheduler, tokenizer.

        The scheduler is the one that the model is to be run with.
        """
        index = json.loads(self.rest.to_json_string())
        names = ("scheduler", *self.family.tokenizers)
        sides = SimpleNamespace(**{side: getattr(self.rest, side, None) for side in names})
        if self.generation is not None and sides.scheduler is not None:
            use_scheduler(sides, self.generation.scheduler)
            index["scheduler"] = ["diffusers", type(sides.scheduler).__name__]
        index.pop("_name_or_path", None)  # a path of this machine
        for part, name in self.replaced.items():
            index[part] = ["diffusers", replacement_class(part, name)]
        if "controlnet" in self.replaced:
            index["_class_name"] = self.family.controlnet
        if index.pop("adapter", None):  # no part of a bundle
            index["_class_name"] = self.family.by_channels[4]
        index |= {part: [None, None] for part in self.family.absent if part in index}
        write_json(folder / "model_index.json", index | dict(self.family.options))
        for side, found in vars(sides).items():
            if found is not None:
                found.save_pretrained(folder / side)
        for tokenizer in self.family.tokenizers:
            write_tokenizer_files(getattr(self.rest, tokenizer, None), folder / tokenizer)  # for Optimum


def open_source(
    model: Model | StableDiffusionPipeline,
    replaced: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
    digests: Mapping[str, str] | None = None,
    loras: Loras = (),
) -> Source:
    """What `model`, its replaced parts and its LoRAs are; nothing heavy is loaded yet. `dtype`: of modules when loaded.

    A named model has another VAE as `with_vae` gives it one. `digests` of the weights, where they are known already:
    hashing reads all of them.

    Raises ModelError or InputError for what is no model, no VAE, no ControlNet or no LoRA of this model.
    """
    replaced = {part: absolute(name) for part, name in replaced.items()}
    vae = replaced.pop("vae", None) if isinstance(model, str | Path | ModelSource) else None
    for part, name in replaced.items():
        check_whole(part, name)
    if not isinstance(model, str | Path | ModelSource):
        check_parts(model, replaced, f"this {type(model).__name__}")
        about = {"model": type(model).__name__, "kind": "pipeline", "random_weights": False, **replaced}
        unet, scheduler = getattr(model, "unet", None), type(getattr(model, "scheduler", None)).__name__
        told = implied({} if unet is None else unet.config, scheduler, type(model).__name__)
        fused, notes = parse_loras(loras), []
        if fused:
            notes = check_loras(fused, module_config(unet), lambda part: getattr(model, part, None), made=told)
        about |= _noted(notes, fused)
        told = generation_of(fused) or told
        return Source(about, model, replaced=replaced, dtype=dtype, generation=told, loras=fused)
    found = with_vae(with_loras(resolve(model), loras), vae)
    own = found.base if isinstance(found, WithVae) else found  # the model without what it is exported with
    base = own.base if isinstance(own, FusedSource) else own
    name = str(Path(base.name).absolute()) if base.kind in ("folder", "single-file", "checkpoint") else base.name
    about = {"model": name, "kind": base.kind, "random_weights": found.random_weights, **replaced}
    about |= {"vae": found.vae} if isinstance(found, WithVae) else {}
    about |= _noted(own.notes, loras_of(found))
    rest = load_rest(found)
    check_parts(rest, replaced, f"model {found.name!r}")
    return Source(about, rest, found, dtype, replaced, found.generation, digests or found.digests)


def _noted(notes: Sequence[str], loras: Sequence[Lora]) -> dict[str, Any]:
    """What a manifest's source says where there is something to say."""
    found = {"notes": list(notes), LORAS: [asdict(lora) for lora in loras]}
    return {key: value for key, value in found.items() if value}


def check_parts(pipe: Any, replaced: Container[str], where: str) -> None:
    """ModelError when a part that is not replaced is of a class that is not exported; nothing is loaded.

    Several ControlNets may stay eager: `component_module` refuses them where they are to be exported.
    """
    for part in (part for part in EXPORTED if part not in replaced):
        module = getattr(pipe, part, None)
        module = getattr(module, "_orig_mod", module)  # of torch.compile
        noted = (*(pipe.config.get(part) or ()), None, None)[1]  # of a pipeline without its weights
        if (kind := type(module) if module is not None else noted) and not hasattr(module, "nets"):
            check_exported(part, kind, where)


def state_digest(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a state dict: the identity of weights that have no file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
