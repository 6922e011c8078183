"""An exported program that torch.onnx translates as it is, without tracing it once more.

`torch.onnx.export` decomposes every program into core operators first, which traces the whole graph again: half of the
time of a UNet's export. Little comes of it, as inference graphs of diffusers and transformers consist of operators that
have ONNX translations of their own. What is left to do: casts have none, and steps that change nothing should go.
Then it runs the graph once more in search of operands to promote, though the trace recorded the dtype of each.
"""

from __future__ import annotations

import contextlib
import functools
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

ATEN = torch.ops.aten
# Give their input back where its shape and dtype are what is asked for.
OFTEN_NOTHING = frozenset({ATEN.to, ATEN.view, ATEN.reshape, ATEN.expand, ATEN.contiguous})

_PROMOTION = "torch.onnx._internal.fx.passes.type_promotion"
_APIS = "torch.onnx._internal._lazy_import:onnxscript_apis"


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


@contextlib.contextmanager
def without_repeats() -> Iterator[None]:
    """Meanwhile torch.onnx does not do again what is done: see `_recorded` and `_kept`.

    Where this version of torch has no such step, nothing is changed.
    """
    with _swapped(_PROMOTION, "_TypePromotionInterpreter", _recorded), _swapped(_APIS, "get_torchlib_ops", _kept):
        yield


@contextlib.contextmanager
def _swapped(place: str, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Meanwhile an attribute of what `place` names is what `make` makes of it."""
    try:
        holder = pkgutil.resolve_name(place)
        original = getattr(holder, name)
        made = make(original)
    except (ImportError, AttributeError):
        yield
        return
    setattr(holder, name, made)
    try:
        yield
    finally:
        setattr(holder, name, original)


def _recorded(original: Any) -> Any:
    """The pass that promotes operands, with the values that the trace recorded; it runs only the steps it changes."""
    rule_of = pkgutil.resolve_name(_PROMOTION).get_type_promotion_rule

    class Recorded(original):
        def run_node(self, n: Node) -> Any:
            if n.op != "call_function" or "val" not in n.meta:
                return super().run_node(n)
            if rule := rule_of(n, self.type_promotion_table):
                with self._set_current_node(n):
                    self._maybe_promote_node(n, rule)
            return n.meta["val"]

    return Recorded


@functools.cache
def _kept(original: Callable[[], Any]) -> Callable[[], Any]:
    """The list of translations, for which the library parses the source of each of its functions, made once."""
    return functools.cache(original)


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
