"""A component's module to an ONNX graph with the contract's names, through torch.export."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from export.graph.components import component_state, dynamic_shapes, example_inputs, example_sizes, graph_module
from export.graph.initializers import fold_transposes, merge_constants, name_initializers, opaque_weights, strip_prefix
from export.graph.precision import float_nodes, float_softmax
from export.graph.quick_program import QuickProgram, is_functional, without_repeats
from export.graph.twins import trace
from sdkd.bundle.program import save_program
from sdkd.core.collection import paused_gc
from sdkd.core.components import COMPONENTS
from sdkd.core.contract import Contract
from sdkd.errors import ExportError, InputError
from sdkd.targets.registry import check_target

# Attention, GroupNormalization and Gelu stay whole at 23: 39 % fewer nodes than at 18 (646 instead of 1,056). But the
# VAE's one attention head of width 512 has no fused kernel: TensorRT-RTX 1.7.1 fails on opset 23's node and builds
# opset 22, which keeps GroupNormalization whole, its statistics in float32: 187 nodes in SD's decoder, 337 at opset 18;
# onnxruntime needs the same time for both.
OPSETS = dict.fromkeys(COMPONENTS, 23) | {"vae_decoder": 22, "vae_encoder": 22}
MIN_OPSET, MAX_OPSET = 18, 23  # what torch's exporter implements and onnxruntime's CPU kernels run

# Above this many bytes of weights they go to model.onnx.data: a protobuf file cannot exceed 2 GB, and writing one takes
# two more copies of its weights in memory.
EXTERNAL_BYTES = 500_000_000
GRAPH, DATA = "model.onnx", "model.onnx.data"
_TALKATIVE = ("torch.onnx", "torch.export", "torch.fx", "torch._dynamo", "onnxscript", "onnx_ir")
_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class OnnxGraph:
    """An exported graph in memory: how each weight is stored in it, which are not in it by name, float32 islands."""

    model: Any  # onnx_ir.Model
    opset: int
    transforms: Mapping[str, str]
    unmatched: tuple[str, ...]
    float_nodes: Mapping[str, int]  # of a half-precision graph

    @property
    def nodes(self) -> Counter[str]:
        """Number of nodes by operator."""
        return Counter(node.op_type for node in self.model.graph)


def choose_opset(component: str, opset: int | None = None, target: str | None = None) -> int:
    """The component's measured opset, or the given one, or one that the target's older library parses.

    InputError when the exporter does not know the given one.
    """
    if opset is None:
        return MIN_OPSET if target is not None and _is_old(target) else OPSETS[component]
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise InputError(f"opset {opset} is not between {MIN_OPSET} and {MAX_OPSET}: leave --opset out for the default")
    return opset


def _is_old(target: str) -> bool:
    """Whether a target's installed library has no attention of its own: then it parses no ONNX Attention either."""
    found = check_target(target)
    if not found.name.startswith("tensorrt") or importlib.util.find_spec(found.module) is None:
        return False
    return not hasattr(importlib.import_module(found.module), "IAttention")


def to_onnx(
    module: nn.Module,
    contract: Contract,
    config: Mapping[str, Any],
    opset: int | None = None,
    program_file: Path | None = None,
) -> OnnxGraph:
    """Export a component's module (already in the contract's precision) with dynamic axes.

    `program_file`: where the traced program is kept, too, without its weights (`sdkd.bundle.program`). Axes that the
    exporter made static are left so: the parity gate names them. Raises ExportError with the component's name and the
    first line of the cause.
    """
    component, version = contract.component, choose_opset(contract.component, opset)
    # A vocabulary smaller than the example's ids would fail inside torch with an index error.
    tokens = min(int(config.get("vocab_size", 256)), 256)
    inputs = example_inputs(contract, example_sizes(contract, config), tokens=tokens)
    try:
        # The collector would look again and again at the millions of symbols that a trace makes, and find little.
        with silence(), paused_gc(), torch.no_grad():
            program = trace(graph_module(contract, module), inputs, dynamic_shapes(contract, config))
            if program_file is not None:
                save_program(program, program_file)  # as it was traced: its translation changes it
            model = _translate(program, contract, version)
    except Exception as error:
        raise ExportError(
            f"{component} could not be exported at opset {version} ({_cause(error)}): check that it is an unmodified "
            f"diffusers module, or try another --opset"
        ) from error
    return _finish(model, contract, version, component_state(component, module))


def _translate(program: torch.export.ExportedProgram, contract: Contract, opset: int) -> Any:
    model = _quickly(program, contract, opset) or _to_ir(program, contract, opset)
    strip_prefix(model)
    fold_transposes(model)
    with opaque_weights(model):
        _simplify(model)
    return model


def _quickly(program: torch.export.ExportedProgram, contract: Contract, opset: int) -> Any:
    """The graph without torch's decompositions, which take as long as the trace; None where it needs some."""
    if not is_functional(program):
        return None
    with contextlib.suppress(torch.onnx.OnnxExporterError):
        return _to_ir(QuickProgram(program), contract, opset)
    return None


def _to_ir(program: torch.export.ExportedProgram, contract: Contract, opset: int) -> Any:
    with without_repeats():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=[spec.name for spec in contract.inputs],
            output_names=[spec.name for spec in contract.outputs],
            optimize=False,  # done by `_simplify`: torch's own merges equal weights, which no weight swap could undo
            verbose=False,
        )
    assert exported is not None
    return exported.model


def _simplify(model: Any) -> None:
    """Onnxscript's optimisation, without its merging of equal initializers."""
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer, rewriter

    # All of the library's rules but one, which looks through the whole graph at every node, for pairs of Slices that
    # make a Split: torch's own chunk is a Split already.
    rules = [rule for rule in getattr(rewriter, "_DEFAULT_REWRITE_RULES", ()) if rule.name != "SlicesSplit"]
    passes.InlinePass()(model)
    for _ in range(2):
        optimizer.fold_constants_ir(model, onnx_shape_inference=True)
        rewriter.rewrite(model, rules or None)
    passes.RemoveUnusedNodesPass()(model)
    passes.OutputFixPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def _finish(model: Any, contract: Contract, opset: int, state: Mapping[str, torch.Tensor]) -> OnnxGraph:
    found = model.opset_imports.get("", opset)
    if found != opset:
        raise ExportError(f"{contract.component} came out at opset {found} instead of {opset}: leave --opset out")
    transforms, unmatched = name_initializers(model, state)
    merge_constants(model, transforms)
    half = any(spec.dtype in ("float16", "bfloat16") for spec in contract.outputs)
    if half:
        float_softmax(model)
    islands = float_nodes(model) if half else {}
    _name_axes(model, contract)
    _name_nodes(model)
    _drop_notes(model)
    return OnnxGraph(model, opset, transforms, unmatched, islands)


def _name_axes(model: Any, contract: Contract) -> None:
    """Give symbolic axes the contract's names; an axis that came out static stays static, for the gate to find."""
    import onnx_ir as ir

    values = [*model.graph.inputs, *model.graph.outputs]
    for value, spec in zip(values, [*contract.inputs, *contract.outputs], strict=False):
        if value.shape is None or len(value.shape) != len(spec.axes):
            continue
        dims = [size if isinstance(size, int) else name for size, name in zip(value.shape, spec.axes, strict=True)]
        value.shape = ir.Shape(dims)


def _name_nodes(model: Any) -> None:
    """Name nodes by the module that made them, as in `mid_block.attentions.0.proj_in/MatMul`: profilers show it."""
    import ast

    used: Counter[str] = Counter()
    for node in model.graph:
        scopes = [part for part in ast.literal_eval(node.metadata_props.get(_SCOPES, "[]")) if part]
        scope = next((part for part in reversed(scopes) if part == "module" or part.startswith("module.")), "")
        name = f"{scope.removeprefix('module').removeprefix('.') or 'root'}/{node.op_type}"
        used[name] += 1
        node.name = name if used[name] == 1 else f"{name}_{used[name]}"


def _drop_notes(model: Any) -> None:
    """Remove source paths and intermediate shapes: the first are this machine's, the second bear other axis names."""
    import onnx_ir.passes.common as passes

    passes.ClearMetadataAndDocStringPass()(model)
    outputs = set(model.graph.outputs)
    for node in model.graph:
        for value in node.outputs:
            if value not in outputs:
                value.shape = value.type = None
    model.metadata_props.clear()
    model.producer_name, model.producer_version, model.doc_string = "sdkd", None, None


def save(graph: OnnxGraph, folder: Path, limit: int = EXTERNAL_BYTES) -> tuple[Path, ...]:
    """Write `model.onnx` into the component's folder, weights above `limit` bytes beside it; graph file first."""
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in graph.model.graph.initializers.values())
    external = size > limit
    folder.mkdir(parents=True, exist_ok=True)
    ir.save(graph.model, folder / GRAPH, external_data=DATA if external else None)
    return (folder / GRAPH, folder / DATA) if external else (folder / GRAPH,)


def forget_weights(graph: OnnxGraph) -> None:
    """Let go of a saved graph's weights: the library's rewrite rules keep the last graph that they saw."""
    for value in graph.model.graph.initializers.values():
        value.const_value = None


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep the exporter's warnings and notes off the terminal; errors still pass."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _cause(error: BaseException) -> str:
    """The innermost cause's type and first line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
