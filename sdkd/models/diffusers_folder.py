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
from sdkd.families import PIPELINES, STABLE_DIFFUSION, SUPPORTED, Family, family_of_pipeline
from sdkd.models.clip_tokenizer import bounded
from sdkd.models.exportable import check_guidance
from sdkd.models.families import CLASSES, empty, part_classes, remade
from sdkd.models.generation import Generation
from sdkd.models.refusals import OTHER_EXPORT, is_other_export, other_folder
from sdkd.models.safetensors_file import fill, folder_tensors, matched, weight_files

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

PROVENANCE = "sdkd.json"  # beside model_index.json: what sdkd knows about a pipeline that it wrote
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")  # others may read files that can run code
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")  # that model_index.json may name: nothing else is run


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


def check_pipeline_folder(path: Path) -> Family:
    """The family of the pipeline that `path` holds as diffusers saves it; ModelError unless it is one that sdkd takes,
    weights included.
    """
    where = f"folder {str(path)!r}"
    if not (path / "model_index.json").is_file():
        raise ModelError(f"{where} {other_folder(path)}")
    index = _json(path / "model_index.json")
    if is_other_export(path):
        raise ModelError(f"{where} {OTHER_EXPORT}")
    kind = str(index.get("_class_name"))
    family = family_of_pipeline(kind)
    if family is None or kind not in PIPELINES:
        raise ModelError(f"{where} holds {an(kind)}: {SUPPORTED}, that is {', '.join(PIPELINES)}")
    _check_complete(path, family, where)
    _check_libraries(index, family, where)
    for file in path.rglob("*"):
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise ModelError(f"{str(file)!r} is no regular file: save or download the model again")
    if (noise := path / "scheduler" / "scheduler_config.json").is_file():
        _config(noise)
    for part in family.parts:
        config = _config(path / part / "config.json")
        if part == "unet":
            check_guidance(kind, config, where)
        folder_tensors(path / part)
    return family


def _check_complete(path: Path, family: Family, where: str) -> None:
    missing = [part for part in (*family.parts, *family.tokenizers, "scheduler") if not (path / part).is_dir()]
    for encoder in family.text_encoders:  # without a text encoder, and its tokenizer, a model can be another one
        if (
            encoder.part in missing
            and {*missing} <= {encoder.part, encoder.tokenizer}
            and encoder.part in family.without
        ):
            raise ModelError(f"{where} {family.without[encoder.part]}")
    if missing:
        raise ModelError(f"pipeline {where} lacks {', '.join(missing)}: save or download it again")


def _check_libraries(index: Mapping[str, Any], family: Family, where: str) -> None:
    """ModelError for parts of other classes, which could run code of their own."""
    for name, value in index.items():
        if isinstance(value, list) and value and value[0] not in (*LIBRARIES, None):
            raise ModelError(
                f"{where} names code of its own for its {name} ({value[0]}), which sdkd does not run: give a pipeline "
                f"whose parts are of {' and '.join(LIBRARIES[:2])}"
            )
    for part in (*family.tokenizers, "scheduler"):
        name = str((*(index.get(part) or ()), None, None)[1])
        if not (name.endswith("Scheduler") if part == "scheduler" else name in TOKENIZERS):
            raise ModelError(
                f"the {part} of {where} is {an(name)}: sdkd loads {TOKENIZERS[0]} and diffusers' schedulers"
            )
    for part in family.parts:
        library, name = (*(index.get(part) or ()), None, None)[:2]
        own, kinds = CLASSES[part][0], part_classes(family, part)
        if library != own or name not in kinds:
            what = an(f"{library}.{name}")
            raise ModelError(f"the {part} of {where} is {what}: sdkd loads {' or '.join(kinds)} of {own}")


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
    family = family_of_pipeline(index["_class_name"])
    assert family is not None
    kind = getattr(diffusers, PIPELINES[index["_class_name"]])
    without = dict.fromkeys((*family.parts, *family.absent))
    pipe = kind.from_pretrained(folder, local_files_only=True, **family.options, **without)
    for encoder in family.text_encoders:
        positions = _json(folder / encoder.part / "config.json").get("max_position_embeddings")
        setattr(pipe, encoder.tokenizer, bounded(getattr(pipe, encoder.tokenizer), positions))
    pipe.register_to_config(**{part: tuple(index[part]) for part in family.parts})
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
        whole = remade(pipe, **others)
    with quiet_libraries():
        whole.save_pretrained(folder)
    family = family_of_pipeline(type(pipe).__name__) or STABLE_DIFFUSION
    for encoder in family.text_encoders:
        write_old_names(folder / encoder.part / "model.safetensors")
        write_tokenizer_files(getattr(whole, encoder.tokenizer), folder / encoder.tokenizer)
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
