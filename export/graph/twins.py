"""Operators that cost a trace most of its time, under other names meanwhile: their shapes need no computation.

With dynamic axes, torch.export follows norms, attention and linear layers through every step of theirs, with symbols
for sizes: half of the time of a trace. A twin has its operator's schema and says its result's shape at once; after the
trace the operator itself stands in the graph again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_ATEN = torch.ops.aten
_LIBRARY = torch.library.Library("sdkd", "DEF")
_ORIGINALS: dict[Any, Any] = {}  # by twin


def _like_input(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _linear(tensor: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return tensor.new_empty((*tensor.shape[:-1], weight.shape[0]))


def _twin(operator: Any, shape: Callable[..., torch.Tensor]) -> Any:
    """A new operator with `operator`'s schema, and for tracing only: it computes nothing."""
    name = operator._schema.name.partition("::")[2]
    _LIBRARY.define(str(operator._schema).partition("::")[2].replace(f"{name}.", name, 1))
    torch.library.register_fake(f"sdkd::{name}", shape, lib=_LIBRARY)
    twin = getattr(torch.ops.sdkd, name).default
    _ORIGINALS[twin] = operator
    return twin


_GROUP_NORM = _twin(_ATEN.group_norm.default, _like_input)
_LAYER_NORM = _twin(_ATEN.layer_norm.default, _like_input)
_SDPA = _twin(_ATEN.scaled_dot_product_attention.default, _attention)
_LINEAR = _twin(_ATEN.linear.default, _linear)


def _group_norm(tensor: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    return _GROUP_NORM(tensor, groups, weight, bias, eps)


def _layer_norm(tensor: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    return _LAYER_NORM(tensor, list(shape), weight, bias, eps)


_SWAPS: Mapping[Any, Callable[..., Any]] = {
    functional.group_norm: _group_norm,
    functional.layer_norm: _layer_norm,
    functional.scaled_dot_product_attention: _SDPA,
    functional.linear: _LINEAR,
}


class Twins(TorchFunctionMode):
    """Inside, torch.nn.functional's operators of this module are their twins."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the twin where there is one."""
        return _SWAPS.get(func, func)(*args, **(kwargs or {}))


def trace(module: torch.nn.Module, inputs: tuple[Any, ...], shapes: tuple[Any, ...]) -> ExportedProgram:
    """`torch.export.export` with `dynamic_shapes`, non-strict; its graph has no twins."""
    with Twins():
        program = torch.export.export(
            module, inputs, dynamic_shapes=shapes, strict=False, prefer_deferred_runtime_asserts_over_guards=True
        )
    for node in program.graph.nodes:
        node.target = _ORIGINALS.get(node.target, node.target)
    return program
