"""What a user may call a model, and the eager pipeline behind it.

MODEL is a diffusers folder, a hub id, a single-file .safetensors, a bundle, a checkpoint of a run, `demo` (the embedded
teacher) or `random:sd15`, `random:sd15-tiny`, ... (full-size shapes with random weights).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkd.bundle.manifest import MANIFEST, Bundle
from sdkd.core.files import read_json
from sdkd.errors import ModelError
from sdkd.models import single_file
from sdkd.models.checkpoint import base_of, is_checkpoint, unet_folder
from sdkd.models.diffusers_folder import check_pipeline_folder, provenance, quiet_libraries
from sdkd.models.kinds import (
    BundleSource,
    CheckpointSource,
    DemoSource,
    FolderSource,
    HubSource,
    RandomSource,
    SingleFileSource,
)
from sdkd.models.random_weights import PREFIX, parse
from sdkd.models.source import ModelSource, Part, as_model_error
from sdkd.students.blocks import student_names

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

__all__ = ["Model", "ModelSource", "load_component", "load_eager", "load_rest", "provenance", "resolve"]

Model = str | Path | ModelSource
"""A model's name, or the model that was opened by it."""

DEMO = "demo"
DEMO_WEIGHTS = Path(__file__).parents[1] / "demo" / "weights"
_FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".onnx")  # what ends so is a file that is not there
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(model: Model) -> ModelSource:
    """Say what a model name means, without loading it; ModelError when it means nothing that sdkd can use.

    An opened model is given back as it is.
    """
    if isinstance(model, ModelSource):
        return model
    name = str(model)
    if name == DEMO:
        return _demo()
    if name.startswith(PREFIX):
        return RandomSource(name, None, True, opened=parse(name))
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(name, path)
    if path.is_file():
        return _file(name, path)
    if _HUB_ID.fullmatch(name) and path.suffix.lower() not in _FILES:
        return HubSource(name)
    raise ModelError(
        f"model {name!r} does not exist: give a diffusers folder, a hub id such as segmind/tiny-sd, "
        f"a .safetensors file, a bundle, {DEMO!r}, or {PREFIX}sd15-tiny"
    )


def _demo() -> ModelSource:
    if not (DEMO_WEIGHTS / "model_index.json").is_file():
        raise ModelError(
            "the demo's teacher is not in this installation (sdkd/demo/weights is missing): install sdkd again, "
            "or in a checkout train it with: python tools/train_demo_teacher.py"
        )
    return DemoSource(DEMO, DEMO_WEIGHTS)


def _folder(name: str, path: Path) -> ModelSource:
    if (path / MANIFEST).is_file():
        random = bool(Bundle.open(path).manifest.source.get("random_weights"))
        return BundleSource(name, path, random, find=resolve)
    if is_checkpoint(path):
        return _checkpoint(name, path)
    check_pipeline_folder(path)
    students = student_names(read_json(path / "unet" / "config.json"))
    notes = (f"its UNet has the blocks of the student {' or '.join(students)}",) if students else ()
    return FolderSource(name, path, bool(provenance(path).get("random_weights")), notes)


def _checkpoint(name: str, path: Path) -> ModelSource:
    unet_folder(path)
    of = base_of(path)
    try:
        base = resolve(of)
    except ModelError as error:
        raise ModelError(f"checkpoint {name!r} needs the model that it was trained on ({error})") from error
    notes = (f"a checkpoint among the other parts of {of}",)
    return CheckpointSource(name, path, base.random_weights, notes, base=base)


def _file(name: str, path: Path) -> ModelSource:
    if path.suffix.lower() != ".safetensors":
        raise ModelError(
            f"model {name!r} is a {path.suffix or 'nameless'} file: of single files only .safetensors is read "
            "(pickles can run code on loading); convert it where you trust its origin, with "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True)['state_dict'], NEW_FILE), or give a "
            "diffusers folder"
        )
    opened = single_file.open_checkpoint(path)
    return SingleFileSource(name, path, bool(opened.about.get("random_weights")), opened.notes, opened=opened)


def load_eager(model: Model, torch_dtype: torch.dtype | None = None) -> StableDiffusionPipeline:
    """The model as an eager diffusers pipeline on the CPU: eval mode, frozen, without safety checker.

    `torch_dtype` None means float32. Raises ModelError when there is no such model, it is of no family that sdkd
    knows, or its files are damaged or cannot be fetched.
    """
    import torch

    source = resolve(model)
    with as_model_error(source), quiet_libraries():
        pipe = source.original.load_whole(torch_dtype or torch.float32)
    for part in source.parts:
        getattr(pipe, part).eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_component(model: Model, part: Part, torch_dtype: torch.dtype | None = None) -> Any:
    """One module of the model, `unet`, `vae` or a text encoder, as `load_eager` gives it, without loading the others.

    On the CPU, in eval mode, frozen; `torch_dtype` None means float32. Raises ModelError as `load_eager` does.
    """
    import torch

    source = resolve(model)
    with as_model_error(source), quiet_libraries():
        module = source.original.load_part(part, torch_dtype or torch.float32)
    return module.eval().requires_grad_(False)


def load_rest(model: Model) -> StableDiffusionPipeline:
    """The model's pipeline without weights: tokenizer, scheduler and config, with None for the heavy modules.

    Its `to_json_string()` (model_index.json) names the classes of the absent modules all the same. Raises ModelError as
    `load_eager` does.
    """
    source = resolve(model)
    with as_model_error(source), quiet_libraries():
        pipe = source.original.load_rest()
    pipe.set_progress_bar_config(disable=True)
    return pipe
