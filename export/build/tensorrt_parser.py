"""Why TensorRT's parser refuses a graph: the operator, its node, the module of the network it is in, its inputs."""

from __future__ import annotations

from typing import Any

from export.build.errors import NOISE
from export.build.job import Job
from sdkd.targets.tensorrt_api import ParserError, TensorRT

SHOWN = 3  # nodes; the rest is counted


def parser_errors(trt: TensorRT, job: Job, typed: bool) -> str | None:
    """What the parser says of each node that it refuses, in words; None when it says nothing.

    The graph is parsed a second time, since Polygraphy drops the parser with its errors.
    """
    log = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if typed else 0)
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(job.onnx):
        return None
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    nodes = _nodes(job)
    said = list(dict.fromkeys(_describe(error, job, nodes) for error in errors))
    if not said:
        return None
    more = f"; and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
    return "; ".join(said[:SHOWN]) + more


def _describe(error: ParserError, job: Job, nodes: list[Any]) -> str:
    node = _node(error, nodes)
    if node is None:
        return f"the parser says: {_said(error)}"
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    found = f"{node.name!r}{module_path(node.name, job.component)}" if node.name else f"number {error.node()}"
    return (
        f"the parser refuses operator {operator} at node {found}, with inputs "
        f"{', '.join(_inputs(job, node)) or 'none'} (it says: {_said(error)})"
    )


def _said(error: ParserError) -> str:
    return "; ".join(line.strip() for line in error.desc().splitlines() if line.strip() and not NOISE.search(line))


def _node(error: ParserError, nodes: list[Any]) -> Any:
    """The node that an error is about: by name, or by number where nodes have no names."""
    if error.node_name():
        return next((node for node in nodes if node.name == error.node_name()), None)
    index = error.node()
    fits = 0 <= index < len(nodes) and nodes[index].op_type == error.node_operator()
    return nodes[index] if fits else None


def module_path(name: str, component: str) -> str:
    """Where a node is in its network: `mid_block.attentions.0.proj_in/MatMul` -> ` in mid_block.attentions.0.proj_in`.

    Exported nodes are named after the module whose `forward` made them.
    """
    path, slash, _ = name.rpartition("/")
    return f" in {path} of the {component}" if slash and path else ""


def _nodes(job: Job) -> list[Any]:
    import onnx

    return list(onnx.load(job.onnx, load_external_data=False).graph.node)


def _inputs(job: Job, node: Any) -> list[str]:
    """A node's inputs with type and shape, where the graph says them."""
    import onnx

    graph = onnx.load(job.onnx, load_external_data=False).graph
    known = {value.name: _typed(value.type.tensor_type) for value in (*graph.input, *graph.value_info)}
    known |= {
        tensor.name: f"{_dtype(tensor.data_type)} {'x'.join(map(str, tensor.dims))}" for tensor in graph.initializer
    }
    return [f"{name} ({known[name]})" if name in known else name for name in node.input if name]


def _typed(tensor: Any) -> str:
    axes = "x".join(str(axis.dim_param or axis.dim_value) for axis in tensor.shape.dim)
    return f"{_dtype(tensor.elem_type)} {axes}"


def _dtype(number: int) -> str:
    import onnx

    return str(onnx.TensorProto.DataType.Name(number).lower())
