"""The kinds of names that a model may have, each a small class that knows its files."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sdkd.bundle.manifest import Bundle
from sdkd.core.components import CONFIG_FOLDERS
from sdkd.core.files import read_json
from sdkd.errors import ModelError
from sdkd.families import STABLE_DIFFUSION, Family, family_of_pipeline
from sdkd.models import checkpoint, single_file
from sdkd.models.diffusers_folder import (
    check_pipeline_folder,
    component_digest,
    digest,
    load_part,
    load_rest,
    quiet_libraries,
)
from sdkd.models.families import part_config
from sdkd.models.fused import recorded_loras, with_loras
from sdkd.models.generation import Generation, noted
from sdkd.models.random_weights import RandomModel
from sdkd.models.replacements import is_here, with_vae
from sdkd.models.source import Kind, ModelSource, Part, as_model_error
from sdkd.students.blocks import full_config

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

# Parts that sdkd does not use, so that they are not fetched and may be pickles.
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


class FolderSource(ModelSource):
    """A diffusers folder."""

    kind: ClassVar[Kind] = "folder"
    advice = "its files are damaged or incomplete; save or download it again"

    @property
    def folder(self) -> Path:
        """Where the files are."""
        assert self.path is not None
        return self.path

    @property
    def index(self) -> Mapping[str, Any]:
        """As the base class says."""
        return dict(read_json(self.folder / "model_index.json"))

    @cached_property
    def family(self) -> Family:
        """As the base class says, by the class of its pipeline."""
        return family_of_pipeline(str(self.index.get("_class_name"))) or STABLE_DIFFUSION

    @cached_property
    def digests(self) -> dict[str, str]:
        """As the base class says."""
        found: dict[str, str] = {part: component_digest(self.folder / part) for part in self.parts}
        return {name: found[CONFIG_FOLDERS[name]] for name in self.family.components}

    def config(self, part: str) -> dict[str, Any]:
        """As the base class says."""
        file = self.folder / part / "config.json"
        return dict(read_json(file)) if part in ("unet", "vae") or file.is_file() else {}

    def load_part(self, part: Part, dtype: torch.dtype) -> Any:
        """One module of the pipeline."""
        return load_part(self.folder, part, dtype)

    def load_rest(self) -> StableDiffusionPipeline:
        """The pipeline without its heavy modules."""
        return load_rest(self.folder)


def downloaded(name: str, *, local_only: bool = False) -> Path:
    """Folder of a hub model in the local cache, fetched when it is not there, unless `local_only`.

    ModelError when the model has no .safetensors weights; OSError and others, as the hub's library raises them, when
    there is no such model or no connection.
    """
    from diffusers import DiffusionPipeline

    for variant in (None, "fp16"):  # full precision where the hub has it
        options = {"variant": variant, "local_files_only": local_only, **dict.fromkeys(_UNUSED)}
        try:
            return Path(DiffusionPipeline.download(name, use_safetensors=True, **options))
        except OSError as error:
            if "`safetensors` weights" not in str(error):
                raise
    raise ModelError(
        f"hub model {name!r} has no complete .safetensors weights, and pickles can run code on loading: convert it, "
        f"if you trust its origin, with StableDiffusionPipeline.from_pretrained({name!r}).save_pretrained(FOLDER), "
        "and give the folder"
    )


class DemoSource(FolderSource):
    """The embedded teacher."""

    kind: ClassVar[Kind] = "demo"
    advice = "install sdkd again"


@dataclass(frozen=True)
class HubSource(FolderSource):
    """A hub id; fetched into the local cache when its files are first asked for, unless `local_only`."""

    kind: ClassVar[Kind] = "hub"
    advice = (
        "there is no such folder here, and the hub did not give it; check the spelling and the network, or download it "
        "elsewhere with `hf download` and give the folder"
    )

    local_only: bool = False

    @cached_property
    def folder(self) -> Path:
        """Checked folder of the model in the local cache."""
        with as_model_error(self), quiet_libraries():
            found = downloaded(self.name, local_only=self.local_only)
            check_pipeline_folder(found)
            return found

    @property
    def here(self) -> bool:
        """Whether the model was fetched for this source."""
        return "folder" in self.__dict__

    @property
    def original(self) -> ModelSource:
        """The folder in the cache."""
        return FolderSource(self.name, self.folder)

    @property
    def provenance(self) -> Mapping[str, Any]:
        """As the base class says; empty before the model was fetched."""
        return self.original.provenance if self.here else {}


@dataclass(frozen=True)
class BundleSource(ModelSource):
    """A bundle: ONNX graphs and engines of a model, which `find` opens by its name."""

    kind: ClassVar[Kind] = "bundle"
    advice = "give the original model instead"

    find: Callable[[str], ModelSource] = field(kw_only=True, repr=False, compare=False)

    @cached_property
    def bundle(self) -> Bundle:
        """The bundle, as it was when it was first asked for."""
        assert self.path is not None
        return Bundle.open(self.path)

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What its manifest says of the model that it was exported from."""
        return self.bundle.manifest.source

    @property
    def index(self) -> Mapping[str, Any]:
        """As the base class says."""
        return self.bundle.json("model_index.json") if (self.bundle.path / "model_index.json").is_file() else {}

    @property
    def family(self) -> Family:
        """As the base class says."""
        return self.bundle.family

    @cached_property
    def generation(self) -> Generation | None:
        """As the base class says; without a UNet only what is noted."""
        has_unet = "unet" in self.bundle.manifest.components
        return super().generation if has_unet else noted(self.provenance, f"bundle {self.name!r}")

    @property
    def digests(self) -> dict[str, str]:
        """Of the model that the bundle was exported from."""
        return {name: record.source_sha256 for name, record in self.bundle.manifest.components.items()}

    def config(self, part: str) -> dict[str, Any]:
        """The config of a part, as the bundle keeps it."""
        if part == "vae":
            return self.bundle.vae_config()
        names = [name for name, folder in CONFIG_FOLDERS.items() if folder == part]
        found = [name for name in names if (self.bundle.path / name / "config.json").is_file()]
        return self.bundle.config((found or names)[0]) if found or part == "unet" else {}

    @property
    def origin(self) -> ModelSource:
        """The model that the bundle was exported from, without LoRAs; ModelError when it is gone, or a bundle, too."""
        found = self.find(str(self.bundle.manifest.source.get("model", "")))
        if found.kind == "bundle":
            raise ModelError(f"{found.name!r} is a bundle, too")
        return found

    @property
    def original(self) -> ModelSource:
        """The model that the bundle was exported from, with LoRAs and VAE, of a hub only what is in the local cache."""
        try:
            found = self.origin
            # The user named the bundle: what that names is not asked of the hub.
            found = HubSource(found.name, local_only=True).original if found.kind == "hub" else found
        except (ModelError, OSError, ValueError) as error:
            raise ModelError(
                f"bundle {self.name!r} holds ONNX graphs and engines, not PyTorch weights, and the model it was "
                f"made from ({str(self.bundle.manifest.source.get('model', ''))!r}) is gone: give that model's new "
                f"place, or use the bundle as it is, with: {shlex.join(['sdkd', 'generate', self.name, 'PROMPT'])}"
            ) from error
        fused = with_loras(found, recorded_loras(self.bundle.manifest.source))
        vae = self.bundle.manifest.source.get("vae")
        if vae is not None and not is_here(str(vae)):
            raise ModelError(
                f"bundle {self.name!r} was made with the VAE {str(vae)!r}, which is no folder here: give the model it "
                f"was made from, {found.name!r}, with --vae"
            )
        return with_vae(fused, vae if vae is None else str(vae))

    def load_part(self, part: Part, dtype: torch.dtype) -> Any:
        """One of its modules."""
        return self.original.load_part(part, dtype)

    def load_rest(self) -> StableDiffusionPipeline:
        """Its pipeline without the heavy modules."""
        return self.original.load_rest()


@dataclass(frozen=True)
class FamilySource(ModelSource):
    """A model with the configs, tokenizer and scheduler of a published family."""

    opened: single_file.Checkpoint | RandomModel = field(kw_only=True, repr=False, compare=False)

    @property
    def family(self) -> Family:
        """As the base class says."""
        return self.opened.family

    @cached_property
    def digests(self) -> dict[str, str]:
        """As the base class says, from the digest of the whole file, or from the name."""
        return {name: digest(f"{self.opened.identity} {name}") for name in self.family.components}

    def config(self, part: str) -> dict[str, Any]:
        """The config of a part, the UNet's with its defaults."""
        if part == "unet":
            return full_config(self.opened.unet_config)
        return part_config(self.family, self.opened.model, part)

    def load_part(self, part: Part, dtype: torch.dtype) -> Any:
        """One module of the pipeline."""
        return self.opened.load_part(part, dtype)

    def load_rest(self) -> StableDiffusionPipeline:
        """The pipeline without its heavy modules."""
        return self.opened.rest()


class SingleFileSource(FamilySource):
    """A checkpoint in one .safetensors file."""

    kind: ClassVar[Kind] = "single-file"
    advice = "the file is damaged or incomplete; download it again"

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What sdkd noted in the file; empty for other programs' files."""
        return self.opened.about if isinstance(self.opened, single_file.Checkpoint) else {}


class RandomSource(FamilySource):
    """A model of full size with random weights, by name: equal names have equal weights."""

    kind: ClassVar[Kind] = "random"
    advice = "give another name"


@dataclass(frozen=True)
class CheckpointSource(ModelSource):
    """A checkpoint of a run: its UNet among the other parts of `base`, the model that the run was given."""

    kind: ClassVar[Kind] = "checkpoint"
    advice = "its files are damaged or incomplete; give another checkpoint"

    base: ModelSource = field(kw_only=True)

    @cached_property
    def _unet(self) -> Path:
        assert self.path is not None
        return checkpoint.unet_folder(self.path)

    @cached_property
    def digests(self) -> dict[str, str]:
        """As the base class says."""
        return self.base.digests | {"unet": component_digest(self._unet)}

    @property
    def index(self) -> Mapping[str, Any]:
        """As the base class says, of its base."""
        return self.base.index

    @property
    def family(self) -> Family:
        """As the base class says, of its base."""
        return self.base.family

    def config(self, part: str) -> dict[str, Any]:
        """The config of a part, the UNet's the checkpoint's own."""
        return dict(read_json(self._unet / "config.json")) if part == "unet" else self.base.config(part)

    def load_part(self, part: Part, dtype: torch.dtype) -> Any:
        """One module of the pipeline."""
        assert self.path is not None
        return checkpoint.load_own(self.path, dtype) if part == "unet" else self.base.original.load_part(part, dtype)

    def load_rest(self) -> StableDiffusionPipeline:
        """The pipeline without its heavy modules."""
        return self.base.original.load_rest()
