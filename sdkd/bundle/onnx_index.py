"""Where each weight of an exported graph lies, so that a few numbers of each can be read without reading the rest.

A graph of half a gigabyte holds its weights inside: parsing it would read all of them. Only the protobuf's lengths are
followed here.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sdkd.bundle.onnx_weights import TRANSFORMS_FILE, TRANSPOSE
from sdkd.core.files import read_json
from sdkd.errors import BundleError

if TYPE_CHECKING:
    import torch

# Numbers of onnx.proto's fields, and of its data types: part of the format.
_GRAPH, _INITIALIZER, _DIMS, _TYPE, _NAME, _RAW, _EXTERNAL, _KEY, _VALUE = 7, 5, 1, 2, 8, 9, 13, 1, 2
_TYPES = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # kinds of protobuf fields


@dataclass(frozen=True)
class StoredWeight:
    """A weight as a graph stores it: its shape there, whether that is the transpose's, and where its bytes begin."""

    dtype: str  # torch's name
    stored: tuple[int, ...]
    transposed: bool
    path: Path
    offset: int

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the state dict."""
        return self.stored[::-1] if self.transposed else self.stored

    def read(self, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Numbers `[first, last)` of the stored order, span after span, in the stored dtype."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        data = bytearray()
        with self.path.open("rb") as file:
            for first, last in spans:
                file.seek(self.offset + first * dtype.itemsize)
                data += file.read((last - first) * dtype.itemsize)
        if len(data) != sum(last - first for first, last in spans) * dtype.itemsize:
            raise BundleError(f"{str(self.path)!r} is cut off: export the model again")
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def stored_weights_of(onnx_file: Path) -> dict[str, StoredWeight]:
    """The weights of a graph by state-dict name; empty where the graph has none by name.

    Numbers that are neither float nor stored as bytes are left out. BundleError for a file that is no such graph.
    """
    if not (onnx_file.parent / TRANSFORMS_FILE).is_file():
        return {}
    transforms: Mapping[str, str] = read_json(onnx_file.parent / TRANSFORMS_FILE, dict[str, str])
    found = {}
    try:
        with onnx_file.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for tensor in _initializers(data):
                path, offset = onnx_file, tensor.offset
                if tensor.external:  # a name beside the graph, as the exporter gives it
                    path, offset = onnx_file.with_name(tensor.external["location"]), int(tensor.external["offset"])
                if tensor.name in transforms and tensor.kind in _TYPES and offset >= 0:
                    turned = transforms[tensor.name] == TRANSPOSE
                    found[tensor.name] = StoredWeight(_TYPES[tensor.kind], tuple(tensor.dims), turned, path, offset)
    except (IndexError, ValueError, KeyError, OSError) as error:
        raise BundleError(f"{str(onnx_file)!r} cannot be read as a graph ({error}): export the model again") from error
    return found


@dataclass
class _Initializer:
    name: str = ""
    kind: int = 0
    dims: list[int] = field(default_factory=list)
    offset: int = -1  # of its bytes in the graph's own file
    external: dict[str, str] = field(default_factory=dict)


def _initializers(data: mmap.mmap) -> Iterator[_Initializer]:
    for number, start, end in _fields(data, 0, len(data)):
        if number == _GRAPH:
            for inner, first, last in _fields(data, start, end):
                if inner == _INITIALIZER:
                    yield _initializer(data, first, last)


def _initializer(data: mmap.mmap, start: int, end: int) -> _Initializer:
    found = _Initializer()
    for number, first, last in _fields(data, start, end):
        if number == _DIMS:
            found.dims += _varints(data, first, last)
        elif number == _TYPE:
            found.kind = _varint(data, first)[0]
        elif number == _NAME:
            found.name = data[first:last].decode()
        elif number == _RAW:
            found.offset = first
        elif number == _EXTERNAL:
            pair = {key: data[a:b].decode() for key, a, b in _fields(data, first, last)}
            found.external[pair[_KEY]] = pair[_VALUE]
            found.external.setdefault("offset", "0")
    return found


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number of each field of a message, and where its value begins and ends."""
    while start < end:
        key, start = _varint(data, start)
        kind, first = key & 7, start
        if kind == _VARINT:
            _, start = _varint(data, start)
        elif kind == _BYTES:
            size, first = _varint(data, start)
            start = first + size
        elif kind in (_FIXED64, _FIXED32):
            start += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"field of kind {kind}")
        if start > end:
            raise ValueError("cut off")
        yield key >> 3, first, start


def _varints(data: mmap.mmap, start: int, end: int) -> list[int]:
    found = []
    while start < end:
        value, start = _varint(data, start)
        found.append(value)
    return found


def _varint(data: mmap.mmap, start: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = shift = 0
    while True:
        byte = data[start]
        start += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, start
        shift += 7
