"""Reading and running an exported graph on the CPU with onnxruntime, in any precision."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sdkd.core.contract import Contract, TensorSpec
from sdkd.errors import ParityError
from sdkd.targets.registry import require

PURPOSE = "the comparison of an export with PyTorch"


def read_signature(onnx_file: Path, component: str) -> Contract:
    """Names, dtypes and axes of a graph's inputs and outputs, without reading its weights."""
    import onnx

    graph = onnx.load(onnx_file, load_external_data=False).graph

    def spec(value: Any) -> TensorSpec:
        tensor = value.type.tensor_type
        axes = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
        return TensorSpec(value.name, _dtype_name(tensor.elem_type), axes)

    return Contract(component, tuple(map(spec, graph.input)), tuple(map(spec, graph.output)))


def _dtype_name(element: int) -> str:
    import onnx

    return {"float": "float32"}.get(name := onnx.TensorProto.DataType.Name(element).lower(), name)


def runtime_errors() -> tuple[type[Exception], ...]:
    """Exceptions that onnxruntime raises for a graph or inputs it cannot run; they share no base of their own."""
    require("onnxruntime", PURPOSE)
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException")
    return tuple(getattr(state, name) for name in names)


class GraphSession:
    """A graph opened as it is, without onnxruntime's optimisation: torch tensors in, float32 torch tensors out.

    Not Polygraphy's OnnxrtRunner, whose session takes none of the options that keep memory low.
    """

    def __init__(self, onnx_file: Path) -> None:
        onnxruntime = require("onnxruntime", PURPOSE)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Half-precision weights are cast to float32 just before their use and let go after it: in the usual order, and
        # with an arena, half of them lie in memory twice.
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = onnxruntime.InferenceSession(str(onnx_file), options, providers=["CPUExecutionProvider"])
        except runtime_errors() as error:
            raise ParityError(f"onnxruntime does not open {onnx_file.name} ({first_line(error)})") from error
        self._names = [value.name for value in self._session.get_inputs()]

    def run(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Outputs for inputs in the graph's order; bfloat16 is widened, for the twin. Raises `runtime_errors()`."""
        plain = [tensor.float() if tensor.dtype == torch.bfloat16 else tensor for tensor in inputs]
        feeds = {name: tensor.numpy() for name, tensor in zip(self._names, plain, strict=True)}
        return tuple(torch.from_numpy(array).float() for array in self._session.run(None, feeds))


def first_line(error: BaseException) -> str:
    """An error's first line, shortened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def open_graph(onnx_file: Path, precision: str) -> Iterator[GraphSession]:
    """Open a graph; a bf16 one as its float32 twin, since onnxruntime's CPU has no bfloat16 kernels.

    The twin has the same nodes and the same, already rounded, weights: it shows that the graph is right, while the
    rounding of activations stays to the engine's own check.
    """
    if precision != "bf16":
        yield GraphSession(onnx_file)
        return
    with tempfile.TemporaryDirectory() as name:
        yield GraphSession(_float_twin(onnx_file, Path(name)))


def _float_twin(onnx_file: Path, folder: Path) -> Path:
    import onnx_ir as ir

    model = ir.load(onnx_file)
    graph = model.graph
    for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]:
        if value.dtype == ir.DataType.BFLOAT16:
            value.type = ir.TensorType(ir.DataType.FLOAT)
        if value.const_value is not None and value.const_value.dtype == ir.DataType.BFLOAT16:
            value.const_value = _widened(value.const_value)
    for node in graph:
        target = node.attributes.get("to")
        if target is not None and target.as_int() == ir.DataType.BFLOAT16.value:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT.value)
    ir.save(model, folder / "twin.onnx", external_data="twin.onnx.data")
    return folder / "twin.onnx"


def _widened(tensor: Any) -> Any:
    import numpy as np
    import onnx_ir as ir

    def make() -> Any:
        return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)

    return ir.LazyTensor(make, dtype=ir.DataType.FLOAT, shape=tensor.shape, name=tensor.name)
