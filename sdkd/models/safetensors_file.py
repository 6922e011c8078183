"""Reading .safetensors files: what they hold, and one tensor at a time, so that casting needs no second copy.

Only this format is read: it is a table of contents and bytes, and cannot run code as a pickle can. Files are read, not
mapped as `safe_open` does: what is mapped counts in the peak of memory, the whole file beside what was cast.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from sdkd.errors import ModelError

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
    b"GGUF": "is a GGUF file: give the original .safetensors",
    b"<!DOCTYPE": "is a web page, not weights: download it again",
    b"<html": "is a web page, not weights: download it again",
}


class Tensor(NamedTuple):
    """A tensor that lies in a file: dtype as the format names it, shape, and where its bytes begin and end."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def rows(self, first: int, last: int) -> Tensor:
        """The rows `[first, last)` along the first axis."""
        size = (self.end - self.start) // self.shape[0]
        start, end = (self.start + index * size for index in (first, last))
        return self._replace(shape=(last - first, *self.shape[1:]), start=start, end=end)

    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor on the CPU, numbers with a point cast to `dtype` (None: as in the file); nothing stays mapped."""
        import torch

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


def shapes_of(module: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a module's weights."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def check_complete(missing: Collection[str], total: int, what: str) -> None:
    """ModelError, which begins with `what`, when names are missing."""
    if missing:
        raise ModelError(
            f"{what} lacks {len(missing)} of {total} weights ({some(missing)}): the file is incomplete or of another "
            "kind of model; download or save it again"
        )


def check_shapes(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], what: str) -> None:
    """ModelError, which begins with `what`, when a tensor has another shape than the wanted one."""
    wrong = [name for name, shape in shapes.items() if tensors[name].shape != shape]
    if wrong:
        found, wanted = tensors[wrong[0]].shape, shapes[wrong[0]]
        raise ModelError(
            f"{what} has {len(wrong)} of {len(shapes)} weights in another shape than its configuration says "
            f"({wrong[0]}: expected {list(wanted)}, found {list(found)}): it is of another kind of model"
        )


def some(names: Iterable[str]) -> str:
    """The first few of many names, for a message."""
    ordered = list(names)
    return ", ".join(ordered[:3]) + (", ..." if len(ordered) > 3 else "")
