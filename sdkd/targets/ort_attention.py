"""Attention as ONNX Runtime's CPU runs it best: its own MultiHeadAttention, which never writes the scores.

The `Attention` of opset 23 writes them all: 1 GB for one guided image of 512 px at the UNet's first level.
Both are timed in benchmarks/amd-epyc-avx2-2-cores/runtime.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

FUSED = "MultiHeadAttention"
DOMAIN = "com.microsoft"
HEADS_OUTSIDE = [0, 2, 1, 3]  # (batch, tokens, heads, width) to (batch, heads, tokens, width), and back
DEFAULTS = {"is_causal": 0, "softcap": 0.0, "qk_matmul_output_mode": 0, "softmax_precision": 1}


class _Graph:
    """Who makes and who reads each tensor, and the values of those that are constant."""

    def __init__(self, model: ModelProto) -> None:
        self.makers = {output: node for node in model.graph.node for output in node.output}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.outputs = {value.name for value in model.graph.output}
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}

    def maker(self, name: str, kind: str) -> NodeProto | None:
        """The node that makes a tensor, if it is of a kind."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type == kind else None

    def only_reader(self, name: str, kind: str) -> NodeProto | None:
        """The one node that reads a tensor, if it is of a kind and the tensor goes nowhere else."""
        readers = self.readers[name]
        return readers[0] if len(readers) == 1 and readers[0].op_type == kind and name not in self.outputs else None

    def shape(self, name: str) -> list[int | None]:
        """The elements of a shape, None where they are known at run time alone."""
        joined = self.maker(name, "Concat")
        if joined is None:
            return self._values(name)
        return [element for part in joined.input for element in self._values(part)]

    def _values(self, name: str) -> list[int | None]:
        from onnx import numpy_helper

        if name not in self.constants:
            return [None]
        return [int(value) for value in numpy_helper.to_array(self.constants[name]).reshape(-1)]


def fuse_attention(model: ModelProto) -> int:
    """Put MultiHeadAttention where `Attention` stands between a split into heads and their joining; how many.

    The graph is changed in place. Left alone is what has a mask, is causal, or has other nodes around it. The heads'
    own layout is then MultiHeadAttention's matter, so four transpositions go with each.
    """
    from onnx import helper

    graph, found = _Graph(model), {}
    for node in model.graph.node:
        fused = _fused(graph, node) if node.op_type == "Attention" and not node.domain else None
        if fused is not None:
            found[fused.output[0]] = fused
    if not found:
        return 0
    nodes = [found.get(node.output[0], node) for node in model.graph.node]  # what the joining read comes before it
    kept = _read(nodes, graph.outputs)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    if DOMAIN not in {one.domain for one in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return len(found)


def _read(nodes: Sequence[NodeProto], outputs: Iterable[str]) -> list[NodeProto]:
    """The nodes, in their order, that outputs depend on: the rest of the old form goes."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    return kept[::-1]


def _fused(graph: _Graph, node: NodeProto) -> NodeProto | None:
    """The node that stands for an Attention, its splits and its joining; None where it is not of that form."""
    from onnx import helper

    options = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    scale = options.pop("scale", None)
    if len(node.input) != 3 or len(node.output) != 1 or not _plain(options):
        return None
    sides = [_split(graph, name) for name in node.input]
    joined = _joined(graph, node.output[0])
    heads = {count for _, count in filter(None, sides)}
    if None in sides or joined is None or len(heads) != 1:
        return None
    extra = {} if scale is None else {"scale": scale}
    inputs, (count,) = [side[0] for side in sides if side], heads
    return helper.make_node(FUSED, inputs, [joined], name=node.name, domain=DOMAIN, num_heads=count, **extra)


def _plain(options: Mapping[str, Any]) -> bool:
    return all(name in DEFAULTS and value == DEFAULTS[name] for name, value in options.items())


def _split(graph: _Graph, name: str) -> tuple[str, int] | None:
    """The tensor (batch, tokens, heads x width) that a split into heads starts from, and the number of heads."""
    transpose = graph.maker(name, "Transpose")
    reshape = graph.maker(transpose.input[0], "Reshape") if transpose is not None and _swaps(transpose) else None
    shape = graph.shape(reshape.input[1]) if reshape is not None else []
    if reshape is None or len(shape) != 4 or not shape[2] or not shape[3]:
        return None
    return str(reshape.input[0]), shape[2]


def _joined(graph: _Graph, name: str) -> str | None:
    """The tensor (batch, tokens, heads x width) that the heads are joined into."""
    transpose = graph.only_reader(name, "Transpose")
    reshape = graph.only_reader(transpose.output[0], "Reshape") if transpose is not None and _swaps(transpose) else None
    return str(reshape.output[0]) if reshape is not None and len(graph.shape(reshape.input[1])) == 3 else None


def _swaps(transpose: NodeProto) -> bool:
    return any(one.name == "perm" and list(one.ints) == HEADS_OUTSIDE for one in transpose.attribute)
