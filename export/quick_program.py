"""An exported program that torch.onnx translates as it is, without tracing it once more.

`torch.onnx.export` decomposes every program into core operators first, which traces the whole graph again: half of the
time of a UNet's export. Little comes of it, as inference graphs of diffusers and transformers consist of operators that
have ONNX translations of their own. What is left to do: casts have none, and steps that change nothing should go.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

ATEN = torch.ops.aten
# Give their input back where its shape and dtype are what is asked for.
OFTEN_NOTHING = frozenset({ATEN.to, ATEN.view, ATEN.reshape, ATEN.expand, ATEN.contiguous})


class QuickProgram(ExportedProgram):
    """Shares everything with `program`, whose graph loses the steps that change nothing and gets translatable casts.

    Only for programs that change no tensor in place (`is_functional`). An operator without a translation makes
    torch.onnx raise OnnxExporterError; `program` itself can still be exported after that.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self.__dict__.update(program.__dict__)
        for node in [node for node in self.graph.nodes if _packet(node) in OFTEN_NOTHING]:
            if _same(node, node.args[0]):
                _replace(node, node.args[0])
            elif _packet(node) is ATEN.to:
                _replace(node, _copy(node))

    def run_decompositions(self, decomp_table: Any = None) -> ExportedProgram:
        """The program as it is."""
        return self


def is_functional(program: ExportedProgram) -> bool:
    """Whether no operator of the program writes into its inputs."""
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    return not any(isinstance(op, torch._ops.OpOverload) and op._schema.is_mutable for op in targets)


def _packet(node: Node) -> Any:
    return getattr(node.target, "overloadpacket", None) if node.op == "call_function" else None


def _same(node: Node, source: Any) -> bool:
    """Whether a node's tensor has its input's dtype and shape; symbolic sizes are compared as written."""
    one, other = node.meta["val"], source.meta["val"]
    return bool(one.dtype == other.dtype and list(map(str, one.shape)) == list(map(str, other.shape)))


def _copy(node: Node) -> Node:
    """The cast that `aten.to` means, in the overload that has a translation."""
    with node.graph.inserting_before(node):
        made = node.graph.call_function(ATEN._to_copy.default, (node.args[0],), {"dtype": node.meta["val"].dtype})
    made.meta = dict(node.meta)
    return made


def _replace(node: Node, instead: Any) -> None:
    node.replace_all_uses_with(instead)
    node.graph.erase_node(node)
