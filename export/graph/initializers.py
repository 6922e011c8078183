"""Weights keep their state-dict names in the ONNX graph: swapping weights, refitting and LoRA depend on it.

The exporter folds the transpose of every linear weight and names the result `val_N`. Here such a weight gets its own
name back, and `initializers.json` says how each is stored: `same` or `transpose` (of a matrix).
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sdkd.bundle.onnx_weights import SAME, TRANSPOSE
from sdkd.bundle.program import PREFIX

if TYPE_CHECKING:
    import torch

_STATE, _TRANSFORM = "sdkd.state", "sdkd.transform"  # notes on initializers while the graph is being made


def strip_prefix(model: Any) -> None:
    """Name initializers as in the state dict of the component, and note which ones come from it."""
    initializers = model.graph.initializers
    for name in [name for name in initializers if name.startswith(PREFIX)]:
        value = initializers.pop(name)
        value.name = name.removeprefix(PREFIX)
        value.meta[_STATE] = value.name
        initializers[value.name] = value


def fold_transposes(model: Any) -> None:
    """Store a matrix transposed where the graph only uses its transpose.

    Lazily: the transposed copy is made when it is written, so that no second copy of the weights is held.
    """
    import onnx_ir as ir

    for name, value in list(model.graph.initializers.items()):
        nodes = [use.node for use in value.uses()]
        if _STATE not in value.meta or not nodes or not all(_is_transpose(node) for node in nodes):
            continue
        folded = ir.Value(name=f"{name}.transposed", type=value.type, shape=ir.Shape(tuple(value.shape)[::-1]))
        folded.const_value = _transposed(value.const_value, folded)
        folded.meta.update({_STATE: name, _TRANSFORM: TRANSPOSE})
        model.graph.register_initializer(folded)
        for node in nodes:
            ir.convenience.replace_all_uses_with(node.outputs[0], folded)
            model.graph.remove(node, safe=True)
        del model.graph.initializers[name]


def _is_transpose(node: Any) -> bool:
    return (
        node.op_type == "Transpose" and "perm" in node.attributes and list(node.attributes["perm"].as_ints()) == [1, 0]
    )


def _transposed(tensor: Any, value: Any) -> Any:
    import onnx_ir as ir

    def make() -> Any:
        return ir.tensor(tensor.numpy().T.copy(), dtype=tensor.dtype, name=value.name)

    return ir.LazyTensor(make, dtype=tensor.dtype, shape=value.shape, name=value.name)


@contextlib.contextmanager
def opaque_weights(model: Any) -> Iterator[None]:
    """Hide the values of all weights from optimisation.

    Otherwise it drops biases that are zero and norms that are one, folds or renames weights: right for these values,
    wrong for those of a later swap.
    """
    hidden = {value: value.const_value for value in model.graph.initializers.values() if _STATE in value.meta}
    for value in hidden:
        value.const_value = None
    try:
        yield
    finally:
        for value, tensor in hidden.items():
            value.const_value = tensor


def name_initializers(model: Any, state: Mapping[str, torch.Tensor]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Give transposed weights their state-dict names; constants keep theirs.

    Returns `{name: transform}` of the weights that the graph holds, and the names of those that it does not.
    """
    found: dict[str, str] = {}
    for value in [value for value in model.graph.initializers.values() if value.meta.get(_STATE) in state]:
        name = value.meta[_STATE]
        found[name] = value.meta.get(_TRANSFORM, SAME)
        _rename(model, value, name)
    return found, tuple(name for name in state if name not in found)


def merge_constants(model: Any, weights: Container[str]) -> None:
    """Make one of equal constants, and then of equal nodes; weights stay apart even when equal, for they may change."""
    import onnx_ir as ir
    import onnx_ir.passes.common as passes

    first: dict[tuple[Any, ...], Any] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if name in weights or tensor is None or value.is_graph_output():
            continue
        key = (tensor.dtype, tuple(tensor.shape), tensor.tobytes())
        if (kept := first.setdefault(key, value)) is not value:
            ir.convenience.replace_all_uses_with(value, kept)
            del model.graph.initializers[name]
    passes.CommonSubexpressionEliminationPass()(model)


def _rename(model: Any, value: Any, name: str) -> None:
    if value.name != name:
        del model.graph.initializers[value.name]
        value.name = name
        if value.const_value is not None:
            value.const_value.name = name
        model.graph.initializers[name] = value
