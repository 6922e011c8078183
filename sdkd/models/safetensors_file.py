"""Weights in .safetensors files: which files a part has, what they hold, and one tensor at a time, cast on the way.

Only this format is read: it is a table of contents and bytes, and cannot run code as a pickle can. Files are read, not
mapped as `safe_open` does: what is mapped counts in the peak of memory, the whole file beside what was cast.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from sdkd.core.files import read_json
from sdkd.errors import InputError, ModelError

if TYPE_CHECKING:
    import torch

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2}  # the others: 1
_CHUNK = 1 << 20  # numbers
_FLOATS = "float32, float16 or bfloat16"
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_LENGTH = 8  # bytes of the header's length, which the file begins with
_PICKLE = "is a pickle under a .safetensors name, which can run code on loading: convert it to real safetensors"
# First bytes of files that are no safetensors at all, and what is the matter then.
_FOREIGN = {
    b"version https://git-lfs": "is a Git LFS pointer, not the weights: fetch them with `git lfs pull`",
    b"PK\x03\x04": _PICKLE,
    b"\x80\x02": _PICKLE,
    b"<!DOCTYPE": "is a web page, not weights: download it again",
    b"<html": "is a web page, not weights: download it again",
}


_BASES = ("diffusion_pytorch_model", "model")  # as diffusers and as transformers name them
_VARIANTS = ("", ".fp16", ".bf16")  # full precision first
_PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")
# Names of the VAE's attention before diffusers 0.17, as in the folders published until then.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Names of adapter layers that lie beside a base layer's weights, as PEFT calls them.
_ADAPTERS = (".base_layer.", ".lora_")


class Tensor(NamedTuple):
    """A tensor that lies in a file: dtype as the format names it, shape, and where its bytes begin and end.

    `transposed`: a matrix that lies there as its transpose; `shape` is its own.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    transposed: bool = False

    def rows(self, first: int, last: int) -> Tensor:
        """The rows `[first, last)` along the first axis."""
        size = (self.end - self.start) // max(self.shape[0], 1)
        start, end = (self.start + index * size for index in (first, last))
        return self._replace(shape=(last - first, *self.shape[1:]), start=start, end=end)

    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor on the CPU, numbers with a point cast to `dtype` (None: as in the file); nothing stays mapped."""
        import torch

        if self.transposed:
            return self._replace(shape=self.shape[::-1], transposed=False).read(dtype).T.contiguous()
        if self.dtype not in DTYPES:
            raise ModelError(f"{str(self.path)!r} holds weights of dtype {self.dtype}: give it in {_FLOATS}")
        own: torch.dtype = getattr(torch, DTYPES[self.dtype])
        result = torch.empty(self.shape, dtype=dtype if dtype is not None and own.is_floating_point else own)
        flat = result.view(-1)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            if result.dtype == own:
                _read_all(file, flat, self.path)
                return result
            buffer = torch.empty(min(len(flat), _CHUNK), dtype=own)  # casts without a second tensor of the whole size
            for piece in flat.split(_CHUNK):
                _read_all(file, buffer[: len(piece)], self.path)
                piece.copy_(buffer[: len(piece)])
        return result


@dataclass(frozen=True)
class Weights:
    """A .safetensors file's table of contents."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def open(path: Path) -> Weights:
        """Read the table of contents and compare it with the file's size; ModelError says what is damaged."""
        header, size = _header(path)
        try:
            found = json.loads(header)
            metadata = {str(key): str(value) for key, value in found.pop("__metadata__", {}).items()}
            tensors = {name: _tensor(path, row, _LENGTH + len(header)) for name, row in found.items()}
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise _damaged(path, "is damaged: its header is not that of a safetensors file", error) from error
        needed = max((tensor.end for tensor in tensors.values()), default=0)
        if needed > size:
            raise _damaged(path, f"is cut off: {size} of {needed} bytes")
        return Weights(path, tensors, metadata)


def _header(path: Path) -> tuple[bytes, int]:
    """The JSON that a .safetensors file begins with, and the file's size."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begin = file.read(32)
            if not begin.startswith(b"{", _LENGTH):
                for mark, what in _FOREIGN.items():
                    if begin.startswith(mark):
                        raise ModelError(f"weights file {str(path)!r} {what}")
            length = int.from_bytes(begin[:_LENGTH], "little")
            if len(begin) < _LENGTH or length > min(size - _LENGTH, _MAX_HEADER):
                raise _damaged(
                    path, f"is cut off or damaged: its {size} bytes do not hold the header that it announces"
                )
            file.seek(_LENGTH)
            return file.read(length), size
    except OSError as error:
        raise ModelError(
            f"weights file {str(path)!r} cannot be read ({error.strerror}): check that it is there and its permissions"
        ) from error


def _damaged(path: Path, what: str, cause: Exception | None = None) -> ModelError:
    reason = f" ({cause})" if cause and len(str(cause)) < 100 else ""
    return ModelError(f"weights file {str(path)!r} {what}{reason}; download or save it again")


def _tensor(path: Path, row: Mapping[str, Any], offset: int) -> Tensor:
    """A row of the header; ValueError, TypeError or KeyError when it contradicts itself."""
    start, end = (int(value) for value in row["data_offsets"])
    shape, dtype = tuple(int(size) for size in row["shape"]), str(row["dtype"])
    wanted = math.prod(shape) * _BYTES.get(dtype, 1)
    if start < 0 or end < start or min(shape, default=0) < 0 or (dtype in DTYPES and end - start != wanted):
        raise ValueError(f"{dtype} of shape {shape} at {start} to {end} is no tensor")
    return Tensor(path, dtype, shape, offset + start, offset + end)


def _read_all(file: Any, tensor: torch.Tensor, path: Path) -> None:
    """Fill a flat tensor with the file's next bytes: one call may return less than what was asked for."""
    import torch

    buffer = memoryview(cast(Any, tensor.view(torch.uint8).numpy()))
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise _damaged(path, "is cut off")
        buffer = buffer[count:]


def fill(module: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """Give a module on the meta device its weights, one after the other, in `dtype`; what it does not have is left."""
    state = {name: tensors[name].read(dtype) for name in module.state_dict()}
    module.load_state_dict(state, assign=True)
    return module


def matched(module: Any, tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """A module's weights by the names that it gives them, which older libraries did not.

    ModelError, which begins with `what`, when some are missing or have other shapes.
    """
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {_current_name(name, shapes): tensor for name, tensor in tensors.items()}
    if missing := [name for name in shapes if name not in found]:
        raise ModelError(
            f"{what} lacks {len(missing)} of {len(shapes)} weights ({some(missing)}): the file is incomplete or of "
            "another kind of model; download or save it again"
        )
    if wrong := [name for name, shape in shapes.items() if found[name].shape != shape]:
        own, wanted = (list(shape) for shape in (found[wrong[0]].shape, shapes[wrong[0]]))
        raise ModelError(
            f"{what} has {len(wrong)} of {len(shapes)} weights in another shape than its configuration says "
            f"({wrong[0]}: expected {wanted}, found {own}): it is of another kind of model"
        )
    return found


def some(names: Iterable[str]) -> str:
    """The first few of many names, for a message."""
    ordered = list(names)
    return ", ".join(ordered[:3]) + (", ..." if len(ordered) > 3 else "")


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
