"""The models that a server has: each on every target that its engines run on here, with ranges and defaults."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from engines.generate.drawing import Settings, batch_range
from engines.generate.image_inputs import PIPELINE_KINDS, SEEING
from engines.generate.loading import choose_target, default_size
from engines.generate.long_prompts import CLIP_TOKENS
from engines.pipelines.parts import engine_names, why_not
from engines.sessions.low_memory import needed
from engines.sessions.opening import expected_device
from sdkd.core.conditions import guidance_width
from sdkd.core.contract import size_multiple
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.errors import InputError, SdkdError
from sdkd.models.generation import USUAL, Generation
from sdkd.models.kinds import BundleSource
from sdkd.models.resolve import resolve
from sdkd.models.source import ModelSource
from sdkd.serve.errors import UnknownNameError

log = logging.getLogger(__name__)
PROCESS_BYTES = 700_000_000  # of a process that draws, beside its engines
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_INPUTS = {"text": frozenset[str](), "image": frozenset({"image"}), "mask": frozenset({"image", "mask"})}


@dataclass(frozen=True)
class Served:
    """One model on one target, an engine set: `id` is its name, with `:target` unless it is the model's usual one."""

    id: str
    name: str
    target: str  # a slot of the bundle, or `eager`
    source: ModelSource

    @property
    def default(self) -> bool:
        """Whether it is what the model's name alone means."""
        return self.id == self.name

    @cached_property
    def ranges(self) -> tuple[ShapeRanges, ...]:
        """What its UNet's engine was built for; empty where any size is drawn."""
        if self.target == "eager" or not isinstance(self.source, BundleSource):
            return ()
        return tuple(self.source.bundle.engine(self.target, "unet").profiles)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width that are drawn where none is asked for, pixels."""
        return default_size(self.source.native_size, self.ranges)

    @cached_property
    def multiple(self) -> int:
        """Pixels that a side is a multiple of."""
        return size_multiple(self.source.unet_config, self.source.config("vae"))

    @cached_property
    def generation(self) -> Generation:
        """Steps, guidance scale and scheduler that are drawn with where none are asked for."""
        return self.source.generation or USUAL

    @cached_property
    def embedded_guidance(self) -> bool:
        """Whether its UNet takes the guidance scale as an embedding, and so looks at one prompt only."""
        return guidance_width(self.source.unet_config) is not None

    @cached_property
    def own_scheduler(self) -> str:
        """The class of the scheduler that it comes with."""
        return str((*(self.source.index.get("scheduler") or ()), None, "its own")[1] or "its own")

    @cached_property
    def takes(self) -> tuple[str, ...]:
        """What it can be given beside a prompt: nothing (`text`), an `image`, an image with a `mask`."""
        possible = SEEING.get(self.channels, ("", tuple(PIPELINE_KINDS), ""))[1]
        return tuple(
            name for name, inputs in _INPUTS.items() if inputs in possible and (not inputs or self._can_encode)
        )

    @property
    def channels(self) -> int:
        """Input channels of its UNet."""
        return int(self.source.unet_config.get("in_channels", 4))

    @property
    def _can_encode(self) -> bool:
        if self.target == "eager" or not isinstance(self.source, BundleSource):
            return True
        return f"{self.target}/vae_encoder" in self.source.bundle.manifest.engines

    @cached_property
    def place(self) -> str:
        """Where its engines work: `cpu` or `cuda`."""
        return "cpu" if self.target == "eager" else expected_device(self.target).type

    def batch(self, settings: Settings) -> Range:
        """Images per call that its engine takes, for prompts of one part; 1 where it runs eagerly."""
        if not self.ranges or not isinstance(self.source, BundleSource):
            return Range.fixed(1)
        contract = self.source.bundle.component("unet").contract
        return batch_range(contract, self.ranges, settings, self._tokens)

    @cached_property
    def _tokens(self) -> int:
        """Tokens that its text encoder takes at once."""
        found = self.source.bundle.positions() if isinstance(self.source, BundleSource) else None
        return found or CLIP_TOKENS

    @cached_property
    def memory_bytes(self) -> int:
        """What a process with it takes, as its engines' sizes tell, or its files."""
        if self.target != "eager" and isinstance(self.source, BundleSource):
            parts = engine_names(self.source.bundle, self.target, self.source.family.parts)
            return PROCESS_BYTES + needed(self.source.bundle, self.target, parts, "max")
        folder = self.source.original.path
        files = folder.glob("*/*.safetensors") if folder is not None and folder.is_dir() else ()
        return PROCESS_BYTES + 2 * sum(file.stat().st_size for file in files)  # half precision becomes float32


@dataclass(frozen=True)
class Catalog:
    """All engine sets of a server, the first model's usual one first."""

    all: tuple[Served, ...]

    @property
    def default(self) -> Served:
        """What is drawn on where no model is named."""
        return self.all[0]

    def find(self, name: str | None) -> Served:
        """The engine set of an id; UnknownNameError, which names all."""
        if name is None:
            return self.default
        for served in self.all:
            if served.id == name:
                return served
        ids = ", ".join(served.id for served in self.all)
        raise UnknownNameError(f"model {name!r} is not served here: choose one of {ids}")


def make_catalog(models: Sequence[str], target: str | None = None) -> Catalog:
    """The engine sets of models as users name them: `MODEL`, or `NAME=MODEL`.

    A bundle is served on every target whose engines run here, or on `target` alone; any other model runs eagerly.
    Raises InputError for no model, a name that is taken or cannot be one, what `resolve` raises, and EngineError, which
    says why, where no engine of a bundle runs here.
    """
    if not models:
        raise InputError("no model to serve: give a bundle, or another model")
    found: dict[str, Served] = {}
    for text in models:
        name, source = _named(text)
        for served in _targets(name, source, target):
            if served.id in found:
                raise InputError(f"two models are called {name!r}: give one another name, such as other={source.name}")
            found[served.id] = served
    return Catalog(tuple(found.values()))


def _named(text: str) -> tuple[str, ModelSource]:
    name, equals, model = text.partition("=")
    if equals and not Path(text).exists():
        if not _NAME.fullmatch(name):
            raise InputError(f"name {name!r} of a model is not usable: take letters, digits, '.', '_' and '-'")
        return name, resolve(model)
    source = resolve(text)
    return _name_of(source), source


def _name_of(source: ModelSource) -> str:
    """What a model is called where its user gave it no name: as its folder, file or hub id ends."""
    path = Path(source.name).expanduser().resolve() if source.path is not None else Path(source.name)
    last = path.stem if path.suffix == ".safetensors" else path.name
    return re.sub(r"[^\w.-]+", "-", last).strip("-.") or "model"


def _targets(name: str, source: ModelSource, target: str | None) -> list[Served]:
    usual = choose_target(source, target)
    first = Served(name, name, usual, source)
    if target is not None or not isinstance(source, BundleSource):
        return [first]
    others = (slot for slot in sorted(source.bundle.slots()) if slot != usual)
    return [first, *(Served(f"{name}:{slot}", name, slot, source) for slot in others if _runs(source, slot))]


def _runs(source: BundleSource, slot: str) -> bool:
    try:
        reason = why_not(source.bundle, slot, source.family.parts)
    except SdkdError as error:
        reason = str(error)
    if reason is not None:
        log.warning("%s is not served on %s: %s", source.name, slot, reason)
    return reason is None
