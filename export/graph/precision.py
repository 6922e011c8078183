"""Half precision by construction: weights and activations are cast in the module, so that the graph says it itself.

Strongly typed builders take every dtype from the graph, so a builder flag cannot do this later.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sdkd.core.contract import Precision, torch_dtype
from sdkd.errors import ExportError

STASHING = ("GroupNormalization", "LayerNormalization")  # operators with the attribute stash_type


def cast(module: nn.Module, precision: Precision, keep: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
    """Cast all floating-point parameters and buffers in place, but for those to `keep`, and return the module.

    Raises ExportError when a finite weight becomes infinite: half precision cannot hold this model.
    """
    dtype = torch_dtype(precision)
    limit = torch.finfo(dtype).max
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    too_large = [name for name, tensor in tensors.items() if name not in (keep or {}) and _overflows(tensor, limit)]
    if too_large:
        raise ExportError(
            f"{len(too_large)} weights are larger than {limit:g}, the largest {precision} number "
            f"(first: {too_large[0]}): export with --precision bf16 or fp32"
        )
    # Not diffusers' own `to`, which warns about modules to keep in float32 though these models name none.
    nn.Module.to(module, dtype)
    for name, value in (keep or {}).items():
        tensors[name].data = value
    return module


def check_finite(module: nn.Module, precision: Precision) -> nn.Module:
    """The module, unchanged; to be asked before it is traced.

    Raises ExportError when a weight is NaN or infinite: the checkpoint is damaged, or was too large for half precision
    when it was loaded in it.
    """
    broken = [name for name, tensor in module.state_dict().items() if not _is_finite(tensor)]
    if broken:
        why = "" if precision == "fp32" else " or its numbers are too large for this precision; try --precision fp32"
        raise ExportError(
            f"{len(broken)} weights are NaN or infinite in {precision} (first: {broken[0]}): the checkpoint is damaged"
            f"{why or ': download or train it again'}"
        )
    return module


def _is_finite(tensor: torch.Tensor) -> bool:
    low, high = _extremes(tensor)
    return math.isfinite(low) and math.isfinite(high)


def _overflows(tensor: torch.Tensor, limit: float) -> bool:
    low, high = _extremes(tensor)
    return math.isfinite(low) and math.isfinite(high) and max(-low, high) > limit


def _extremes(tensor: torch.Tensor) -> tuple[float, float]:
    """The least and the largest value, NaN where there is one; zeros for integers and where there is nothing."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return 0.0, 0.0
    low, high = torch.aminmax(tensor)
    return low.item(), high.item()


def float_softmax(model: Any) -> None:
    """Compute every Softmax of a half-precision graph in float32, between casts.

    There are some where attention is not whole: below opset 23, and in the VAE. A whole Attention needs none: its
    kernels keep the softmax in float32 by themselves, and TensorRT refuses the attribute `softmax_precision`.
    """
    import onnx_ir as ir

    for node in [node for node in model.graph if node.op_type == "Softmax"]:
        (source, output), half = (node.inputs[0], node.outputs[0]), node.outputs[0].dtype
        if half not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            continue
        up = ir.node("Cast", [source], attributes={"to": ir.DataType.FLOAT})
        node.replace_input_with(0, up.outputs[0])
        down = ir.node("Cast", [output], attributes={"to": half})
        for made, shape in ((up, source), (down, output)):
            made.metadata_props.update(node.metadata_props)
            made.outputs[0].shape = shape.shape
        up.outputs[0].dtype, down.outputs[0].dtype = ir.DataType.FLOAT, half
        ir.convenience.replace_all_uses_with(output, down.outputs[0])
        down.replace_input_with(0, output)
        output.dtype = ir.DataType.FLOAT
        model.graph.insert_before(node, up)
        model.graph.insert_after(node, down)


def float_nodes(model: Any) -> dict[str, int]:
    """Islands of float32 in a half-precision graph: how many nodes of each operator compute in float32.

    Those are the sinusoidal timestep embedding, which diffusers computes so, norms whose statistics are kept in
    float32 (`stash_type` 1: GroupNormalization from opset 21 on, LayerNormalization always), Softmax where attention
    is not whole, and the blocks that `export.graph.islands` found.
    """
    import onnx_ir as ir

    def is_float(node: Any) -> bool:
        stash = node.attributes.get("stash_type")
        # The attribute's default is 1, and the exporter leaves it out.
        statistics = node.op_type in STASHING and (stash is None or stash.as_int() == ir.DataType.FLOAT.value)
        return statistics or any(value.dtype == ir.DataType.FLOAT for value in node.outputs)

    return dict(sorted(Counter(node.op_type for node in model.graph if is_float(node)).items()))
