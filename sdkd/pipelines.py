"""Pipeline folders as diffusers writes them: check, load, save, and what sdkd notes beside them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkd.errors import InputError, ModelError
from sdkd.files import new_folder, read_json, sha256, write_bytes, write_json

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

PROVENANCE = "sdkd.json"  # beside model_index.json: what sdkd knows about a pipeline that it wrote
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
NEEDED = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
HEAVY = ("unet", "vae", "text_encoder")  # the parts with weights


def provenance(folder: Path) -> dict[str, Any]:
    """What sdkd wrote about a pipeline folder (teacher, student, steps, random weights); empty for others' folders."""
    return dict(read_json(folder / PROVENANCE)) if (folder / PROVENANCE).is_file() else {}


def check_pipeline_folder(path: Path) -> None:
    """ModelError unless `path` holds a Stable Diffusion 1.x/2.x pipeline as diffusers saves it."""
    if not (path / "model_index.json").is_file():
        raise ModelError(
            f"folder {str(path)!r} is not a diffusers pipeline (no model_index.json): give the folder that "
            "pipeline.save_pretrained wrote, not one of its parts"
        )
    try:
        index = dict(read_json(path / "model_index.json"))
    except InputError as error:
        raise ModelError(f"{error}") from error
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        hint = " (SDXL has another UNet and two text encoders)" if "XL" in str(kind) else ""
        raise ModelError(
            f"folder {str(path)!r} holds a {kind}{hint}: sdkd works on Stable Diffusion 1.x and 2.x, "
            f"that is {', '.join(PIPELINES)}"
        )
    missing = [part for part in NEEDED if not (path / part).is_dir()]
    if missing:
        raise ModelError(f"pipeline folder {str(path)!r} lacks {', '.join(missing)}: save or download it again")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hold back the bars and deprecation notes of diffusers and transformers, which would write over our progress."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
            yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def load_folder(folder: Path, dtype: torch.dtype) -> StableDiffusionPipeline:
    """The pipeline of a checked folder, in `dtype`, without safety checker; raises what diffusers raises."""
    return _class(folder).from_pretrained(folder, torch_dtype=dtype, variant=_variant(folder / "unet"), **_LOCAL)


def load_part(folder: Path, part: str, dtype: torch.dtype) -> Any:
    """One of the heavy parts of a checked folder, in `dtype`; raises what diffusers and transformers raise."""
    import importlib

    library, name = read_json(folder / "model_index.json")[part]
    kind = getattr(importlib.import_module(library), name)
    return kind.from_pretrained(
        folder / part, dtype=dtype, variant=_variant(folder / part), use_safetensors=True, local_files_only=True
    )


def load_rest_of(folder: Path) -> StableDiffusionPipeline:
    """The pipeline of a checked folder without its heavy parts, whose places still name their classes."""
    index = read_json(folder / "model_index.json")
    pipe = _class(folder).from_pretrained(folder, **_LOCAL, **dict.fromkeys(HEAVY))
    pipe.register_to_config(**{part: tuple(index[part]) for part in HEAVY})
    return pipe


_LOCAL: dict[str, Any] = {
    "local_files_only": True,
    "safety_checker": None,
    "feature_extractor": None,
    "image_encoder": None,
    "requires_safety_checker": False,
}


def _class(folder: Path) -> Any:
    from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline

    inpaint = "Inpaint" in read_json(folder / "model_index.json")["_class_name"]
    return StableDiffusionInpaintPipeline if inpaint else StableDiffusionPipeline


def _variant(folder: Path) -> str | None:
    """`fp16` for a component that has no other weights, else None."""
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    return "fp16" if weights and all(".fp16." in file.name for file in weights) else None


def check_checkpoint(path: Path) -> None:
    """ModelError unless a .safetensors file holds a whole Stable Diffusion 1.x/2.x checkpoint (by its names)."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        keys = set(file.keys())
    if any(key.startswith("conditioner.embedders.1.") for key in keys):
        raise ModelError(f"checkpoint {str(path)!r} is SDXL: sdkd works on Stable Diffusion 1.x and 2.x")
    if "model.diffusion_model.input_blocks.0.0.weight" not in keys:
        raise ModelError(
            f"checkpoint {str(path)!r} holds no Stable Diffusion UNet (first weight: {min(keys, default='none')}): "
            "give a whole checkpoint; a LoRA or a VAE alone is not one"
        )


def digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def component_digest(folder: Path) -> str:
    """Digest of a component's config (without notes such as where it was loaded from) and of its weight files."""
    config = {key: value for key, value in read_json(folder / "config.json").items() if not key.startswith("_")}
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return digest("\n".join([json.dumps(config, sort_keys=True), *(f"{file.name} {sha256(file)}" for file in files)]))


def save_pipeline(
    pipe: StableDiffusionPipeline,
    folder: Path,
    *,
    unet: UNet2DConditionModel | None = None,
    about: Mapping[str, Any] | None = None,
    readme: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a whole pipeline folder, all or nothing; `unet` replaces the pipeline's own, which stays untouched.

    `about` becomes the folder's sdkd.json and `readme` its model card. Raises OutputExistsError.
    """
    with new_folder(Path(folder), overwrite) as partial:
        write_pipeline(pipe, partial, unet=unet, about=about, readme=readme)


def write_pipeline(
    pipe: StableDiffusionPipeline,
    folder: Path,
    *,
    unet: UNet2DConditionModel | None = None,
    about: Mapping[str, Any] | None = None,
    readme: str | None = None,
) -> None:
    """What `save_pipeline` does, into a folder that is there: for callers that hold a `new_folder` of their own."""
    whole = pipe
    if unet is not None:
        whole = type(pipe)(**(pipe.components | {"unet": unet}), requires_safety_checker=False)
    with quiet_libraries():
        whole.save_pretrained(folder)
    if about is not None:
        write_json(folder / PROVENANCE, dict(about))
    if readme is not None:
        write_bytes(folder / "README.md", readme.encode())
