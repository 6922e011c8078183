"""Pipeline folders as diffusers writes them: check, load, save, and what sdkd notes beside them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from sdkd.core.files import read_json, sha256, write_bytes, write_json
from sdkd.core.numbers import config_problem
from sdkd.errors import InputError, ModelError, an
from sdkd.models.clip_tokenizer import bounded
from sdkd.models.exportable import check_guidance
from sdkd.models.families import CLASSES, HEAVY, empty
from sdkd.models.generation import Generation
from sdkd.models.refusals import OTHER_EXPORT, SUPPORTED, is_other_export, other_folder
from sdkd.models.safetensors_file import fill, folder_tensors, matched, weight_files

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

PROVENANCE = "sdkd.json"  # beside model_index.json: what sdkd knows about a pipeline that it wrote
# Pipelines that sdkd takes, and the class that loads them.
PIPELINES = {
    "StableDiffusionPipeline": "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline": "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline": "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline": "StableDiffusionInstructPix2PixPipeline",
    "LatentConsistencyModelPipeline": "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline": "LatentConsistencyModelPipeline",
}
NEEDED = (*HEAVY, "tokenizer", "scheduler")
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")  # others may read files that can run code
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")  # that model_index.json may name: nothing else is run
_LOCAL: dict[str, Any] = {
    "local_files_only": True,
    "safety_checker": None,
    "feature_extractor": None,
    "image_encoder": None,
    "requires_safety_checker": False,
}


class _About(TypedDict):
    """What is read of a folder's sdkd.json."""

    teacher: NotRequired[str]
    student: NotRequired[str]
    base: NotRequired[str]
    random_weights: NotRequired[bool]
    generation: NotRequired[Generation]
    teacher_scaling_factor: NotRequired[float]


def provenance(folder: Path) -> dict[str, Any]:
    """What sdkd wrote about a pipeline folder (teacher, student, steps, random weights); empty for others' folders."""
    file = folder / PROVENANCE
    return dict(read_json(file, _About, strict=True)) if file.exists() else {}


def check_pipeline_folder(path: Path) -> None:
    """ModelError unless `path` holds a Stable Diffusion 1.x/2.x pipeline as diffusers saves it, weights included."""
    where = f"folder {str(path)!r}"
    if not (path / "model_index.json").is_file():
        raise ModelError(f"{where} {other_folder(path)}")
    index = _json(path / "model_index.json")
    if is_other_export(path):
        raise ModelError(f"{where} {OTHER_EXPORT}")
    kind = str(index.get("_class_name"))
    if kind not in PIPELINES:
        raise ModelError(f"{where} holds {an(kind)}: {SUPPORTED}, that is {', '.join(PIPELINES)}")
    missing = [part for part in NEEDED if not (path / part).is_dir()]
    if missing:
        raise ModelError(f"pipeline {where} lacks {', '.join(missing)}: save or download it again")
    for name, value in index.items():
        if isinstance(value, list) and value and value[0] not in (*LIBRARIES, None):
            raise ModelError(
                f"{where} names code of its own for its {name} ({value[0]}), which sdkd does not run: give a pipeline "
                f"whose parts are of {' and '.join(LIBRARIES[:2])}"
            )
    for part, allowed in (("tokenizer", TOKENIZERS), ("scheduler", "Scheduler")):
        name = str((*(index.get(part) or ()), None, None)[1])
        if not (name.endswith(allowed) if isinstance(allowed, str) else name in allowed):
            raise ModelError(
                f"the {part} of {where} is {an(name)}: sdkd loads {TOKENIZERS[0]} and diffusers' schedulers"
            )
    for file in path.rglob("*"):
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise ModelError(f"{str(file)!r} is no regular file: save or download the model again")
    if (noise := path / "scheduler" / "scheduler_config.json").is_file():
        _config(noise)
    for part, (own, kinds) in CLASSES.items():
        library, name = (*(index.get(part) or ()), None, None)[:2]
        if library != own or name not in kinds:
            what = an(f"{library}.{name}")
            raise ModelError(f"the {part} of {where} is {what}: sdkd loads {' or '.join(kinds)} of {own}")
        config = _config(path / part / "config.json")
        if part == "unet":
            check_guidance(kind, config, where)
        folder_tensors(path / part)


def _json(file: Path) -> dict[str, Any]:
    try:
        return dict(read_json(file, dict[str, Any]))
    except InputError as error:
        raise ModelError(f"{error}: save or download the model again") from error


def _config(file: Path) -> dict[str, Any]:
    """A component's configuration; ModelError when it is damaged or has numbers that no model has."""
    found = _json(file)
    if wrong := config_problem(found):
        raise ModelError(f"file {str(file)!r}: {wrong}; save or download the model again")
    return found


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hold back the bars and notes of diffusers and transformers, which would write over our progress and messages."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    shown = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
            yield
    finally:
        diffusers_logging.set_verbosity(verbosity)
        for library in shown:
            library.enable_progress_bar()


def load_part(folder: Path, part: str, dtype: torch.dtype) -> Any:
    """One of the heavy parts of a checked folder, in `dtype`, with one copy of its weights in memory.

    ModelError when weights are missing or have other shapes than the config says.
    """
    return load_module(folder / part, part, _json(folder / "model_index.json")[part][1], dtype)


def load_unet(folder: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    """A UNet from a folder of its own, in `dtype`; ModelError as `load_part`."""
    found: UNet2DConditionModel = load_module(folder, "unet", None, dtype)
    return found


def load_module(folder: Path, part: str, kind: str | None, dtype: torch.dtype) -> Any:
    """A part, or a ControlNet, from a folder of its own; `kind` names its class. ModelError as `load_part`."""
    what = f"{folder.name} of {str(folder.parent)!r}"
    config = _config(folder / "config.json")
    if "quantization_config" in config:
        raise ModelError(
            f"{what} is quantized, and sdkd needs the weights as they were before: give the original model"
        )
    module = empty(part, config, kind)
    return fill(module, matched(module, folder_tensors(folder), what), dtype)


def load_rest(folder: Path) -> StableDiffusionPipeline:
    """The pipeline of a checked folder without its heavy parts, whose places still name their classes."""
    import diffusers

    index = _json(folder / "model_index.json")
    kind = getattr(diffusers, PIPELINES[index["_class_name"]])
    pipe = kind.from_pretrained(folder, **_LOCAL, **dict.fromkeys(HEAVY))
    positions = _json(folder / "text_encoder" / "config.json").get("max_position_embeddings")
    pipe.tokenizer = bounded(pipe.tokenizer, positions)
    pipe.register_to_config(**{part: tuple(index[part]) for part in HEAVY})
    return pipe


def digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def component_digest(folder: Path) -> str:
    """Digest of a component's config (without notes such as where it was loaded from) and of its weight files."""
    config = {key: value for key, value in read_json(folder / "config.json").items() if not key.startswith("_")}
    files = weight_files(folder)
    return digest("\n".join([json.dumps(config, sort_keys=True), *(f"{file.name} {sha256(file)}" for file in files)]))


def write_pipeline(
    pipe: StableDiffusionPipeline,
    folder: Path,
    *,
    unet: UNet2DConditionModel | None = None,
    scheduler: Any = None,
    about: Mapping[str, Any] | None = None,
    readme: str | None = None,
) -> None:
    """Write a whole pipeline into a folder; `unet` and `scheduler` replace the pipeline's own, which stays untouched.

    `about` becomes the folder's sdkd.json, by which it may be replaced later, and `readme` its model card.
    """
    whole, given = pipe, {"unet": unet, "scheduler": scheduler}
    if others := {name: part for name, part in given.items() if part is not None}:
        whole = type(pipe)(**(pipe.components | others), requires_safety_checker=False)
    with quiet_libraries():
        whole.save_pretrained(folder)
    write_old_names(folder / "text_encoder" / "model.safetensors")
    write_tokenizer_files(whole.tokenizer, folder / "tokenizer")
    if about is not None:
        write_json(folder / PROVENANCE, dict(about))
    if readme is not None:
        write_bytes(folder / "README.md", readme.encode())


def write_old_names(file: Path) -> None:
    """Give a text encoder's weights the names that transformers 4 reads; 5 drops the prefix, and reads both.

    Without them transformers 4 draws the text encoder at random, with no more than a warning.
    """
    from safetensors.torch import load_file, save_file

    weights = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def write_tokenizer_files(tokenizer: Any, folder: Path) -> None:
    """Write vocab.json and merges.txt, as transformers 4 reads a tokenizer; 5 writes tokenizer.json alone."""
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        backend.model.save(str(folder))
