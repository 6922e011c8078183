"""An opened model: what its name turned out to mean, what its configs say, and how its modules are loaded.

What a source has read, it keeps: commands open a model once and pass it on.
"""

from __future__ import annotations

import contextlib
import errno
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from sdkd.core.contract import native_size, vae_scale
from sdkd.errors import ModelError
from sdkd.families import Family
from sdkd.models.diffusers_folder import provenance
from sdkd.models.families import remade
from sdkd.models.generation import Generation, implied, named, noted

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

Kind = Literal["folder", "hub", "single-file", "bundle", "checkpoint", "demo", "random", "with-vae", "fused"]
Part = Literal["unet", "vae", "text_encoder", "text_encoder_2"]


@dataclass(frozen=True)
class ModelSource(ABC):
    """A model's name as given, where its files are (None: hub, random), and whether its weights are random.

    `notes` are what a user should know, such as how it is known what a single file predicts. Methods raise ModelError
    when files are damaged or cannot be fetched.
    """

    kind: ClassVar[Kind]
    advice: ClassVar[str]  # what to do when its files cannot be loaded

    name: str
    path: Path | None = None
    random_weights: bool = False
    notes: tuple[str, ...] = ()

    @property
    def original(self) -> ModelSource:
        """Where the PyTorch weights are: itself, but for a bundle and a hub id."""
        return self

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What sdkd noted beside a model that it made; empty for other models."""
        return provenance(self.path) if self.path is not None and self.path.is_dir() else {}

    @property
    def index(self) -> Mapping[str, Any]:
        """Its model_index.json, which names the classes of pipeline and parts; empty where it has none."""
        return {}

    @property
    @abstractmethod
    def family(self) -> Family:
        """The family that it is of, which says what parts and components it has."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of its pipeline that have weights."""
        return cast(tuple[Part, ...], self.family.parts)

    @cached_property
    def generation(self) -> Generation | None:
        """How it was made to be run, as a note, its configs or its name tell; None where nothing does."""
        index = self.index
        if found := noted(self.provenance, f"{self.kind} {self.name!r}"):
            return found
        scheduler = (*(index.get("scheduler") or ()), None, None)[1]
        return implied(self.unet_config, scheduler, index.get("_class_name")) or named(self.family, self.name)

    @property
    @abstractmethod
    def digests(self) -> dict[str, str]:
        """One SHA-256 per component of the family of its config and weights.

        Equal digests mean equal weights; nothing is loaded.
        """

    @abstractmethod
    def config(self, part: str) -> dict[str, Any]:
        """The config of `unet`, `vae` or another part, without loading weights; empty where no file says it."""

    @cached_property
    def unet_config(self) -> dict[str, Any]:
        """The UNet's config."""
        return self.config("unet")

    @cached_property
    def latent_scale(self) -> int:
        """Pixels of an image side per latent."""
        return vae_scale(self.config("vae"))

    @property
    def here(self) -> bool:
        """Whether its files are on this machine; configs of any other are fetched when they are asked for."""
        return True

    @property
    def native_size(self) -> tuple[int, int] | None:
        """Height and width of the model's own images in pixels; None where its configs do not tell."""
        return native_size(self.unet_config, self.config("vae"))

    def load_whole(self, dtype: torch.dtype) -> StableDiffusionPipeline:
        """The eager pipeline."""
        whole: StableDiffusionPipeline = remade(
            self.load_rest(), **{part: self.load_part(part, dtype) for part in self.parts}
        )
        return whole

    @abstractmethod
    def load_part(self, part: Part, dtype: torch.dtype) -> Any:
        """One module of the pipeline."""

    @abstractmethod
    def load_rest(self) -> StableDiffusionPipeline:
        """The pipeline without its heavy modules."""


@dataclass(frozen=True)
class Derived(ModelSource):
    """A model like `base`, but for what a subclass says."""

    base: ModelSource = field(kw_only=True)

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What sdkd noted beside the base."""
        return self.base.provenance

    @property
    def index(self) -> Mapping[str, Any]:
        """The base's own."""
        return self.base.index

    @cached_property
    def generation(self) -> Generation | None:
        """As for the base."""
        return self.base.generation

    @property
    def family(self) -> Family:
        """As for the base."""
        return self.base.family

    @property
    def here(self) -> bool:
        """As for the base."""
        return self.base.here

    def config(self, part: str) -> dict[str, Any]:
        """The config of a part, the base's own."""
        return self.base.config(part)

    def load_part(self, part: Part, dtype: torch.dtype) -> Any:
        """One module of the pipeline, the base's own."""
        return self.base.original.load_part(part, dtype)

    def load_rest(self) -> StableDiffusionPipeline:
        """The pipeline without its heavy modules, the base's own."""
        return self.base.original.load_rest()


@contextlib.contextmanager
def as_model_error(source: ModelSource) -> Iterator[None]:
    """Turn the libraries' errors on a damaged or unreachable model into one that names it and says what to do."""
    from safetensors import SafetensorError

    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model {source.name!r} could not be loaded ({reason}): {source.advice}") from error
