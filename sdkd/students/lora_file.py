"""A LoRA's file: found, read, and written so that nothing is lost.

What sdkd writes has PEFT's own names for every weight (diffusers' older names cover attention only, and a file of both
loses the attention) and, as metadata that diffusers reads, rank, alpha and targets: without it an alpha other than the
rank is lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkd.core.documents import parse_json
from sdkd.core.files import write_bytes
from sdkd.core.marks import LORA_MARK
from sdkd.core.schema import problem
from sdkd.errors import InputError
from sdkd.students.lora_layers import other_kind

if TYPE_CHECKING:
    import torch

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # diffusers' LORA_ADAPTER_METADATA_KEY
ABOUT = "sdkd"  # what sdkd notes of a LoRA, such as how a model is run with it: in the file, which may be renamed
# Types of the settings that are read of a file, whatever part of a pipeline they are of.
_SETTINGS = {
    "r": int,
    "lora_alpha": float,
    "rank_pattern": dict[str, int] | None,
    "alpha_pattern": dict[str, float] | None,
    "target_modules": list[str] | str | None,
    "exclude_modules": list[str] | str | None,
}


def write_lora(
    path: Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any], about: Mapping[str, Any] | None = None
) -> Path:
    """Write LoRA weights, settings and what else is known of them as one .safetensors file, whole or not at all."""
    from safetensors.torch import save

    notes = {"format": "pt", **LORA_MARK}
    if metadata:
        notes[METADATA] = json.dumps(dict(metadata), indent=2, sort_keys=True, default=str)
    if about:
        notes[ABOUT] = json.dumps(dict(about), sort_keys=True)
    write_bytes(path, save({name: value.contiguous() for name, value in state.items()}, metadata=notes))
    return path


def read_lora(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and settings of a LoRA file, or of a folder that holds one; settings are empty when the file has none.

    Raises InputError when it is missing, no .safetensors file (others can run code on loading), damaged, or no LoRA.
    """
    from safetensors import SafetensorError, safe_open

    file = lora_file(Path(path))
    try:
        with safe_open(file, framework="pt") as stream:
            names = stream.keys()  # it is no dict
            state = {name: stream.get_tensor(name) for name in names}
            notes = stream.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"LoRA {str(file)!r} cannot be read ({error}): download or make it again") from error
    if not any("lora" in name for name in state) and other_kind(state) is None:
        first = min(state, default="none")
        raise InputError(f"file {str(file)!r} is no LoRA (first weight: {first}): give a LoRA's .safetensors file")
    return state, _settings(file, notes.get(METADATA, "{}"))


def lora_about(path: Path) -> dict[str, Any]:
    """What sdkd noted in a LoRA's file, empty for others'; InputError as `read_lora`."""
    from safetensors import SafetensorError, safe_open

    file = lora_file(Path(path))
    try:
        with safe_open(file, framework="pt") as stream:
            text = (stream.metadata() or {}).get(ABOUT, "{}")
        found: dict[str, Any] = parse_json(text.encode(), dict[str, Any])
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"LoRA {str(file)!r} cannot be read ({error}): download or make it again") from error
    return found


def _settings(file: Path, text: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = parse_json(text.encode(), dict[str, Any])
        for name, value in found.items():
            if wrong := problem(value, _SETTINGS.get(name.rpartition(".")[2], Any), name):
                raise ValueError(f"is damaged ({wrong})")
    except ValueError as error:
        raise InputError(f"LoRA {str(file)!r} has unusable settings: {METADATA} {error}; make it again") from None
    return found


def lora_file(path: Path) -> Path:
    """The .safetensors file that a path means: itself, or the one in a folder; InputError where there is none."""
    if path.is_dir():
        found = [path / FILE] if (path / FILE).is_file() else sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise InputError(f"folder {str(path)!r} holds {len(found)} .safetensors files: give the LoRA's own")
        return found[0]
    if not path.is_file():
        raise InputError(f"LoRA {str(path)!r} does not exist: give a .safetensors file, or a folder that holds one")
    if path.suffix != ".safetensors":
        raise InputError(
            f"LoRA {str(path)!r} is a {path.suffix or 'nameless'} file: only .safetensors is read "
            "(others can run code on loading); convert it first"
        )
    return path
