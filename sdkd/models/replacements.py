"""Parts that stand in for a model's own, or beside them: a VAE or a ControlNet, by folder, hub id or name.

A VAE is also `demo`, the small one of the embedded teacher, or `random:taesd`, of TAESD's size with random weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sdkd.core.components import CONFIG_FOLDERS
from sdkd.core.contract import is_tiny_vae, vae_scale
from sdkd.core.files import read_json
from sdkd.errors import InputError, ModelError, an
from sdkd.models.diffusers_folder import component_digest, digest, load_module, provenance, quiet_libraries
from sdkd.models.families import EXPORTED, empty
from sdkd.models.random_weights import fill_random
from sdkd.models.safetensors_file import folder_tensors, matched
from sdkd.models.source import Derived, Kind, ModelSource, Part

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

DEMO, RANDOM = "demo", "random:taesd"
DEMO_VAE = Path(__file__).parents[1] / "demo" / "small_vae"
TEACHER_SCALE = "teacher_scaling_factor"  # in the sdkd.json of a VAE that sdkd trained: of the VAE it learnt from
_TINY = "AutoencoderTiny"
_USUAL_SCALE = 0.18215  # of AutoencoderKL, where its config says nothing
_CLOSE = 1e-4  # relative; scaling factors are rounded in configs


def absolute(name: str) -> str:
    """A part's name that means the same from another folder."""
    return str(Path(name).expanduser().absolute()) if is_here(name) and name not in (DEMO, RANDOM) else name


def is_here(name: str) -> bool:
    """Whether a part is on this machine, so that its name is not asked of the hub."""
    return name in (DEMO, RANDOM) or Path(name).expanduser().is_dir()


def short_vae(vae: str) -> str:
    """A VAE's name in labels and of folders: the last part of it."""
    return {DEMO: "demo-vae", RANDOM: "random-taesd"}.get(vae) or Path(vae).name or "vae"


def replacement_class(part: str, name: str) -> str:
    """The diffusers class of a VAE or ControlNet; ModelError when it is neither."""
    config = replacement_config(part, name)
    kind = str(config.get("_class_name"))
    if "quantization_config" in config:
        raise ModelError(f"{part} {name!r} is quantized, and sdkd needs the weights as they were before: give those")
    if kind not in EXPORTED[part]:
        raise ModelError(f"{part} {name!r} is {an(kind)}: give one of {', '.join(EXPORTED[part])}")
    return kind


def replacement_config(part: str, name: str) -> dict[str, Any]:
    """The config of a VAE or ControlNet; ModelError when there is none."""
    import diffusers

    if part == "vae" and name == RANDOM:
        return {**_tiny().config, "_class_name": _TINY}
    path = _path(part, name)
    try:
        if path.is_dir():
            return dict(read_json(path / "config.json", dict[str, Any]))
        if not path.exists() and name.count("/") == 1 and not path.is_absolute():
            return dict(getattr(diffusers, EXPORTED[part][0]).load_config(name))
    except InputError as error:
        raise ModelError(f"{part} {name!r}: {error}: give the folder that save_pretrained wrote") from error
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{part} {name!r} is neither a folder here nor on the hub ({str(error).strip().splitlines()[0]}): check it"
        ) from error
    raise ModelError(f"{part} {name!r} is no folder: give the folder that save_pretrained wrote, or a hub id")


def load_replacement(part: str, name: str, dtype: torch.dtype) -> Any:
    """A VAE or ControlNet, in eval mode and frozen; safetensors only. ModelError when a weight is missing."""
    kind = replacement_class(part, name)
    if part == "vae" and name == RANDOM:
        module = fill_random(_tiny(), 0, dtype)
    else:
        module = load_module(replacement_folder(part, name), part, kind, dtype)
    return module.eval().requires_grad_(False)


def replacement_digests(part: str, name: str) -> dict[str, str]:
    """SHA-256 of config and weights, for each component that is made of the part."""
    found = digest(name) if part == "vae" and name == RANDOM else component_digest(replacement_folder(part, name))
    return {component: found for component, folder in CONFIG_FOLDERS.items() if folder == part}


def check_whole(part: str, name: str) -> None:
    """ModelError, from the headers of its files, unless a VAE or ControlNet has all of its weights.

    A VAE that decodes alone is told from a damaged one.
    """
    kind = replacement_class(part, name)
    if part == "vae" and name == RANDOM:
        return
    folder = replacement_folder(part, name)
    module, tensors = empty(part, replacement_config(part, name), kind), folder_tensors(folder)
    if not any(key.startswith("encoder.") for key in tensors) and part == "vae":
        raise ModelError(
            f"vae {name!r} is a decoder without its encoder, which image-to-image and inpainting need: give a whole "
            "VAE, as `sdkd vae-distill` writes it"
        )
    matched(module, tensors, f"{part} {name!r}")


def check_vae(name: str, unet: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """ModelError unless the VAE `name` decodes what a UNet makes whose model has the VAE config `own`.

    The pipelines of Stable Diffusion divide the UNet's latents by the VAE's scaling factor, and know no shift. So an
    AutoencoderKL must have the factor that the UNet was trained with, its own VAE's; an AutoencoderTiny has learnt
    latents as the UNet makes them, and has 1.
    """
    config = replacement_config("vae", name)
    wanted = float(own.get("scaling_factor") or _USUAL_SCALE)
    pairs: list[tuple[str, Any, Any]] = [
        ("number of latent channels", config.get("latent_channels", 4), unet.get("out_channels", 4)),
        ("number of pixels per latent", vae_scale(config), vae_scale(own)),
        ("number of image channels", config.get("out_channels", 3), own.get("out_channels", 3)),
        ("shift factor", float(config.get("shift_factor") or 0), 0.0),
    ]
    if not is_tiny_vae(own):  # whose factor is not that of the VAE which the UNet was trained with
        factor = config.get("scaling_factor") or (1.0 if is_tiny_vae(config) else _USUAL_SCALE)
        fits = [wanted, 1.0] if is_tiny_vae(config) else [wanted]
        pairs.append(("scaling factor", factor, next((fit for fit in fits if _near(factor, fit)), fits[-1])))
        learnt = provenance(path).get(TEACHER_SCALE) if (path := _path("vae", name)).is_dir() else None
        pairs.append(("teacher's scaling factor", learnt or wanted, wanted))
    for what, found, needed in pairs:
        if not _near(found, needed):
            raise ModelError(
                f"vae {name!r} does not fit the UNet: its {what} is {found:g}, the model needs {needed:g}: give a VAE "
                "that was made for this model's latents (not SDXL's or SD 3's for SD 1.x and 2.x)"
            )


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= _CLOSE * abs(other)


@dataclass(frozen=True)
class WithVae(Derived):
    """A model with another VAE in place of its own."""

    kind: ClassVar[Kind] = "with-vae"
    advice = "give other files"

    vae: str = field(kw_only=True)

    @cached_property
    def digests(self) -> dict[str, str]:
        """As the base class says."""
        return self.base.digests | replacement_digests("vae", self.vae)

    def config(self, part: str) -> dict[str, Any]:
        """The config of a part."""
        return replacement_config("vae", self.vae) if part == "vae" else super().config(part)

    def load_part(self, part: Part, dtype: torch.dtype) -> Any:
        """One module of the pipeline."""
        return load_replacement("vae", self.vae, dtype) if part == "vae" else super().load_part(part, dtype)

    def load_rest(self) -> StableDiffusionPipeline:
        """The pipeline without its heavy modules."""
        pipe = super().load_rest()
        pipe.register_to_config(vae=("diffusers", replacement_class("vae", self.vae)))
        return pipe


def with_vae(source: ModelSource, vae: str | None) -> ModelSource:
    """A model with another VAE in place of any that it has; itself where none is given.

    Raises InputError for a bundle, whose VAE is in its graphs, ModelError for what is no VAE or does not fit the model.
    """
    if vae is None:
        return source
    if source.kind == "bundle":
        raise InputError(
            f"{source.name!r} is a bundle and has its VAE in it: leave --vae {vae} out, or give the model that it was "
            "made from"
        )
    source = source.base if isinstance(source, WithVae) else source
    replacement_class("vae", vae)
    check_vae(vae, source.unet_config, source.config("vae"))
    check_whole("vae", vae)
    name, random = absolute(vae), source.random_weights or vae == RANDOM
    notes = (*source.notes, f"its VAE is {name}")
    return WithVae(source.name, source.path, random, notes, base=source, vae=name)


def _tiny() -> Any:
    return empty("vae", {}, _TINY)


def _path(part: str, name: str) -> Path:
    return DEMO_VAE if part == "vae" and name == DEMO else Path(name).expanduser()


def replacement_folder(part: str, name: str) -> Path:
    """Where the files of a VAE or ControlNet are; those of a hub id are fetched into the local cache."""
    from huggingface_hub import snapshot_download

    if (path := _path(part, name)).is_dir():
        return path
    try:
        with quiet_libraries():
            return Path(snapshot_download(name, allow_patterns=["config.json", "*.safetensors*"]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{part} {name!r} could not be fetched ({reason}): check it, or give a folder") from error
