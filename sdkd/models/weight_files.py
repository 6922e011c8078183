"""The .safetensors files of one part of a pipeline folder: one file or several, in full or in half precision."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from pathlib import Path

from sdkd.core.files import read_json
from sdkd.errors import InputError, ModelError
from sdkd.models.safetensors_file import Tensor, Weights, some

_BASES = ("diffusion_pytorch_model", "model")  # as diffusers and as transformers name them
_VARIANTS = ("", ".fp16", ".bf16")  # full precision first
_PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")
# Names of the VAE's attention before diffusers 0.17, as in the folders published until then.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Names of adapter layers that lie beside a base layer's weights, as PEFT calls them.
_ADAPTERS = (".base_layer.", ".lora_")


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a part's weights; ModelError when there are none, one is missing, or they are pickles."""
    for variant in _VARIANTS:
        for base in _BASES:
            for index in (f"{base}.safetensors.index{variant}.json", f"{base}{variant}.safetensors.index.json"):
                if (folder / index).is_file():
                    return _shards(folder, folder / index)
            if (folder / f"{base}{variant}.safetensors").is_file():
                return [folder / f"{base}{variant}.safetensors"]
    raise ModelError(f"folder {str(folder)!r} {_nothing_usable(folder)}")


def _shards(folder: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name or "\\" in name]
    except (InputError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"index {str(index)!r} is damaged ({error}): download or save the model again") from error
    if outside:
        raise ModelError(f"index {str(index)!r} names files outside its folder ({some(outside)}): do not trust it")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ModelError(
            f"folder {str(folder)!r} lacks {len(missing)} of the {len(names)} files that {index.name} lists "
            f"({some(missing)}): download the model again"
        )
    return [folder / name for name in names]


def _nothing_usable(folder: Path) -> str:
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        return (
            f"holds pickled weights only ({some(pickles)}), which can run code on loading: convert them, if you trust "
            f"their origin, with StableDiffusionPipeline.from_pretrained({str(folder.parent)!r})"
            ".save_pretrained(FOLDER), and give that folder"
        )
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    held = f"holds {some(others)} alone, none of which" if others else "holds no weights: nothing there"
    return f"{held} is named {' or '.join(f'{base}.safetensors' for base in _BASES)}; save or download it again"


def folder_tensors(folder: Path) -> dict[str, Tensor]:
    """Every weight of a part and where it lies; ModelError as for `weight_files`, or when a file is damaged.

    ModelError also for a part that was saved while a LoRA was loaded: its layers have other names then.
    """
    found = {name: tensor for file in weight_files(folder) for name, tensor in Weights.open(file).tensors.items()}
    if has_adapters(found):
        raise ModelError(
            f"folder {str(folder)!r} was saved with a LoRA that is not fused: load its pipeline in diffusers as before "
            "it was saved (the base model and the LoRA), call pipe.fuse_lora() and pipe.unload_lora_weights(), then "
            "pipe.save_pretrained(FOLDER), and give that folder"
        )
    return found


def has_adapters(names: Iterable[str]) -> bool:
    """Whether weights by these names belong to a module with adapter layers, a LoRA that was not fused."""
    return any(mark in f".{name}" for name in names for mark in _ADAPTERS)


def current_names(tensors: Mapping[str, Tensor], wanted: Container[str]) -> dict[str, Tensor]:
    """The weights under the names that today's libraries give them, where those are `wanted`."""
    return {_current_name(name, wanted): tensor for name, tensor in tensors.items()}


def _current_name(name: str, wanted: Container[str]) -> str:
    if name in wanted:
        return name
    *path, module, kind = ("", *name.split("."))
    candidates = (
        ".".join([*path[1:], _OLD_ATTENTION.get(module, module), kind]),
        name.removeprefix("text_model."),
        f"text_model.{name}",
    )
    return next((candidate for candidate in candidates if candidate in wanted), name)
