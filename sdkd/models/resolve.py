"""What a user may call a model, and the eager pipeline behind it.

MODEL is a diffusers folder, a hub id, a single-file .safetensors, a bundle, a checkpoint of a run, `demo` (the embedded
teacher) or `random:sd15`, `random:sd15-tiny`, ... (full-size shapes with random weights).
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from sdkd.bundle.manifest import MANIFEST, Bundle
from sdkd.core.contract import CONFIG_FOLDERS, vae_scale
from sdkd.core.files import read_json, sha256
from sdkd.errors import ModelError
from sdkd.models import single_file
from sdkd.models.checkpoint import base_of, is_checkpoint, load_own, unet_folder
from sdkd.models.clip_tokenizer import clip_tokenizer
from sdkd.models.diffusers_folder import (
    check_pipeline_folder,
    component_digest,
    digest,
    load_folder,
    load_part,
    load_rest_of,
    provenance,
    quiet_libraries,
    save_pipeline,
    write_pipeline,
)
from sdkd.models.families import FAMILIES, HEAVY, student_names
from sdkd.models.hub import downloaded
from sdkd.models.random_weights import PREFIX, parse, random_part, random_pipeline, random_rest
from sdkd.models.source import ModelSource, as_model_error
from sdkd.students.blocks import full_config

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

__all__ = [
    "ModelSource",
    "check_pipeline_folder",
    "latent_scale",
    "load_component",
    "load_eager",
    "load_rest",
    "part_config",
    "provenance",
    "resolve",
    "save_pipeline",
    "source_digests",
    "unet_config",
    "write_pipeline",
]

Part = Literal["unet", "vae", "text_encoder"]
DEMO = "demo"
DEMO_WEIGHTS = Path(__file__).parents[1] / "demo" / "weights"
_OWN = {name: part for name, part in CONFIG_FOLDERS.items() if part in HEAVY}  # the components that a model itself has
_FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".onnx")  # what ends so is a file that is not there
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(model: str | Path) -> ModelSource:
    """Say what a model name means, without loading it; ModelError when it means nothing that sdkd can use."""
    name = str(model)
    if name == DEMO:
        return _demo()
    if name.startswith(PREFIX):
        parse(name)
        return ModelSource(name, "random", None, True)
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(name, path)
    if path.is_file():
        return _file(name, path)
    if _HUB_ID.fullmatch(name) and path.suffix.lower() not in _FILES:
        return ModelSource(name, "hub")
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
    return ModelSource(DEMO, "demo", DEMO_WEIGHTS)


def _folder(name: str, path: Path) -> ModelSource:
    if (path / MANIFEST).is_file():
        return ModelSource(name, "bundle", path, bool(Bundle.open(path).manifest.source.get("random_weights")))
    if is_checkpoint(path):
        return _checkpoint(name, path)
    check_pipeline_folder(path)
    students = student_names(read_json(path / "unet" / "config.json"))
    notes = (f"its UNet has the blocks of the student {' or '.join(students)}",) if students else ()
    return ModelSource(name, "folder", path, bool(provenance(path).get("random_weights")), notes)


def _checkpoint(name: str, path: Path) -> ModelSource:
    unet_folder(path)
    base = base_of(path)
    try:
        random = resolve(base).random_weights
    except ModelError as error:
        raise ModelError(f"checkpoint {name!r} needs the model that it was trained on ({error})") from error
    return ModelSource(name, "checkpoint", path, random, (f"a checkpoint among the other parts of {base}",))


def _file(name: str, path: Path) -> ModelSource:
    if path.suffix.lower() != ".safetensors":
        raise ModelError(
            f"model {name!r} is a {path.suffix or 'nameless'} file: of single files only .safetensors is read "
            "(pickles can run code on loading); convert it where you trust its origin, with "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True)['state_dict'], NEW_FILE), or give a "
            "diffusers folder"
        )
    return ModelSource(name, "single-file", path, notes=single_file.open_checkpoint(path).notes)


def load_eager(model: str | Path, torch_dtype: torch.dtype | None = None) -> StableDiffusionPipeline:
    """The model as an eager diffusers pipeline on the CPU: eval mode, frozen, without safety checker.

    `torch_dtype` None means float32. Raises ModelError when there is no such model, it is not SD 1.x/2.x, or its files
    are damaged or cannot be fetched.
    """
    import torch

    source = resolve(model)
    with as_model_error(source), quiet_libraries():
        pipe = _load_whole(_original(source), torch_dtype or torch.float32)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_component(model: str | Path, part: Part, torch_dtype: torch.dtype | None = None) -> Any:
    """One module of the model, `unet`, `vae` or `text_encoder`, as `load_eager` gives it, without loading the others.

    On the CPU, in eval mode, frozen; `torch_dtype` None means float32. Raises ModelError as `load_eager` does.
    """
    import torch

    source = resolve(model)
    with as_model_error(source), quiet_libraries():
        module = _load_part(_original(source), part, torch_dtype or torch.float32)
    return module.eval().requires_grad_(False)


def load_rest(model: str | Path) -> StableDiffusionPipeline:
    """The model's pipeline without weights: tokenizer, scheduler and config, with None for the heavy modules.

    Its `to_json_string()` (model_index.json) names the classes of the absent modules all the same. Raises ModelError as
    `load_eager` does.
    """
    source = resolve(model)
    with as_model_error(source), quiet_libraries():
        pipe = _load_rest(_original(source))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unet_config(model: str | Path) -> dict[str, Any]:
    """The config of a model's UNet, without loading weights where that is possible; ModelError as for `load_eager`."""
    source = resolve(model)
    if source.kind == "random":
        return dict(parse(source.name).unet_config)
    if source.kind == "single-file":
        assert source.path is not None
        return full_config(single_file.open_checkpoint(source.path).unet_config)
    if source.kind == "checkpoint":
        assert source.path is not None
        return dict(read_json(unet_folder(source.path) / "config.json"))
    return dict(read_json(_folder_of(source) / "unet" / "config.json"))


def part_config(model: str | Path, part: str) -> dict[str, Any] | None:
    """The config of a model's `unet`, `vae` or `text_encoder`, without loading weights; ModelError as for `load_eager`.

    None for the VAE and the text encoder of a single file or random weights, which are their family's.
    """
    if part == "unet":
        return unet_config(model)
    source = resolve(model)
    if source.kind in ("random", "single-file"):
        return None
    names = [name for name, folder in CONFIG_FOLDERS.items() if folder == part] if source.kind == "bundle" else [part]
    found = next((file for name in names if (file := _folder_of(source) / name / "config.json").is_file()), None)
    return None if found is None else dict(read_json(found))


def latent_scale(model: str | Path) -> int:
    """Pixels of an image side per latent, without loading weights; ModelError as for `load_eager`."""
    source = resolve(model)
    if source.kind in ("random", "single-file"):
        return vae_scale(FAMILIES["sd15"].vae)  # every family has this VAE
    if source.kind == "checkpoint":
        assert source.path is not None
        return latent_scale(base_of(source.path))
    part = "vae_decoder" if source.kind == "bundle" else "vae"
    return vae_scale(read_json(_folder_of(source) / part / "config.json"))


def _folder_of(source: ModelSource) -> Path:
    """Where a folder's, a bundle's or a hub model's files are; ModelError when the hub does not give it."""
    if source.path is not None:
        return source.path
    with as_model_error(source), quiet_libraries():
        return _downloaded(source)


def _original(source: ModelSource) -> ModelSource:
    """Where the PyTorch weights are: a bundle's original, a hub model's folder in the cache, else the source itself."""
    if source.kind == "hub":
        return ModelSource(source.name, "folder", _downloaded(source))
    if source.kind != "bundle":
        return source
    assert source.path is not None
    original = str(Bundle.open(source.path).manifest.source.get("model", ""))
    try:
        found = resolve(original)
        if found.kind == "bundle":
            raise ModelError(f"{original!r} is a bundle, too")
        if found.kind != "hub":
            return found
        # The user named the bundle: what that names is not asked of the hub.
        return ModelSource(found.name, "folder", _downloaded(found, local_only=True))
    except (ModelError, OSError, ValueError) as error:
        raise ModelError(
            f"bundle {source.name!r} holds ONNX graphs and engines, not PyTorch weights, and the model it was "
            f"made from ({original!r}) is gone: give that model's new place, or use the bundle as it is, "
            f"with: {shlex.join(['sdkd', 'generate', source.name, 'PROMPT'])}"
        ) from error


def _downloaded(source: ModelSource, *, local_only: bool = False) -> Path:
    """Checked folder of a hub model in the local cache, fetched when it is not there, unless `local_only`."""
    folder = downloaded(source.name, local_only=local_only)
    check_pipeline_folder(folder)
    return folder


def _load_whole(source: ModelSource, dtype: torch.dtype) -> StableDiffusionPipeline:
    if source.kind == "random":
        return random_pipeline(parse(source.name), _tokenizer(source), dtype)
    assert source.path is not None
    if source.kind == "single-file":
        return single_file.load_whole(single_file.open_checkpoint(source.path), dtype)
    if source.kind == "checkpoint":
        rest, parts = _load_rest(source), {part: _load_part(source, part, dtype) for part in get_args(Part)}
        return type(rest)(**(rest.components | parts), requires_safety_checker=False)  # it looks at its UNet once, here
    return load_folder(source.path, dtype)


def _load_part(source: ModelSource, part: Part, dtype: torch.dtype) -> Any:
    if source.kind == "random":
        return random_part(parse(source.name), part, _tokenizer(source), dtype)
    assert source.path is not None
    if source.kind == "single-file":
        return single_file.load_part(single_file.open_checkpoint(source.path), part, dtype)
    if source.kind == "checkpoint":
        return load_own(source.path, dtype) if part == "unet" else _load_part(_base(source), part, dtype)
    return load_part(source.path, part, dtype)


def _load_rest(source: ModelSource) -> StableDiffusionPipeline:
    if source.kind == "random":
        return random_rest(parse(source.name), _tokenizer(source))
    assert source.path is not None
    if source.kind == "single-file":
        return single_file.load_rest(single_file.open_checkpoint(source.path))
    if source.kind == "checkpoint":
        return _load_rest(_base(source))
    return load_rest_of(source.path)


def _base(source: ModelSource) -> ModelSource:
    """The model that a checkpoint's other parts come from."""
    assert source.path is not None
    return _original(resolve(base_of(source.path)))


def _tokenizer(source: ModelSource) -> CLIPTokenizer:
    """The embedded CLIP tokenizer, which pads as the random model's family does."""
    return clip_tokenizer(FAMILIES[parse(source.name).family].pad_token)


def source_digests(model: str | Path) -> dict[str, str]:
    """One SHA-256 per component (text_encoder, unet, vae_decoder, vae_encoder) of its config and weights at the source.

    Equal digests mean equal weights; nothing is loaded. A bundle answers what it was exported from.
    """
    source = resolve(model)
    if source.kind == "bundle":
        assert source.path is not None
        records = Bundle.open(source.path).manifest.components
        return {name: record.source_sha256 for name, record in records.items()}
    if source.kind == "random":
        return {name: digest(f"{source.name} {name}") for name in _OWN}
    if source.kind == "single-file":
        assert source.path is not None
        whole = sha256(source.path)
        return {name: digest(f"{whole} {name}") for name in _OWN}
    if source.kind == "checkpoint":
        assert source.path is not None
        return source_digests(base_of(source.path)) | {"unet": component_digest(unet_folder(source.path))}
    folder = _folder_of(source)
    digests = {part: component_digest(folder / part) for part in HEAVY}
    return {name: digests[part] for name, part in _OWN.items()}
