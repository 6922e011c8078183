"""The traced program that a component's graph was made of, beside it: for compilers that take PyTorch's own programs.

`program.pt2` is torch.export's archive without the weights, which the graph keeps by the same names
(`initializers.json`). Reading one runs what it says: see `sdkd.targets.native_code`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sdkd.errors import BundleError

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

PROGRAM_FILE = "program.pt2"
PREFIX = "module."  # of a component's parameters inside its graph module
_ASSERTIONS = (
    "aten._assert_scalar.default",
    "aten.sym_constrain_range_for_size.default",
    "aten.sym_constrain_range.default",
)
# Of a node: where it stands in the source. The first holds paths of the machine that made it; nothing reads them later.
_NOTES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


def save_program(program: ExportedProgram, file: Path) -> None:
    """Write a program without its weights; the program stays as it is."""
    import torch

    state = program.state_dict
    weights, notes = dict(state), [(node.meta, dict(node.meta)) for node in program.graph.nodes]
    try:
        state.update({name: _hollow(weight) for name, weight in weights.items()})
        for meta, _ in notes:
            for key in _NOTES:
                meta.pop(key, None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights that are no whole storages, as they are meant to be
            torch.export.save(program, file)
    finally:
        state.update(weights)
        for meta, before in notes:
            meta.update(before)


def _hollow(weight: torch.Tensor) -> torch.Tensor:
    """One number that stands for all of a weight's: its shape and dtype, on disk and in memory next to nothing."""
    import torch

    one = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
    return torch.nn.Parameter(one, requires_grad=False) if isinstance(weight, torch.nn.Parameter) else one


def read_program(file: Path, weights: Mapping[str, torch.Tensor]) -> ExportedProgram:
    """A program that `save_program` wrote, with weights by state-dict name, in its shapes and dtypes.

    Raises BundleError when the file is damaged or of another version of torch, or a weight is missing or other.
    """
    import torch

    try:
        program = torch.export.load(file)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise BundleError(
            f"{str(file)!r} cannot be read by torch {torch.__version__} ({reason}): export the model again"
        ) from error
    for name in _used(program):
        place, weight = program.state_dict[name], weights.get(name.removeprefix(PREFIX))
        if weight is None or (weight.shape, weight.dtype) != (place.shape, place.dtype):
            found = "lacks it" if weight is None else f"has {tuple(weight.shape)} {weight.dtype}"
            raise BundleError(
                f"{str(file)!r} takes the weight {name!r} as {tuple(place.shape)} {place.dtype}, and the graph beside "
                f"it {found}: export the model again"
            )
        program.state_dict[name] = torch.nn.Parameter(weight, requires_grad=False)
    _drop_assertions(program)
    return program


def _drop_assertions(program: ExportedProgram) -> None:
    """Take out what the trace asserts of its symbols: images whose smallest features are one latent wide are fine.

    ONNX graphs have none of them either, and both are compared with PyTorch at their own sizes.
    """
    graph = program.graph_module.graph
    for node in [node for node in graph.nodes if str(node.target) in _ASSERTIONS]:
        graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _used(program: ExportedProgram) -> list[str]:
    """Weights that the program reads: one of a VAE's halves carries the names of both."""
    nodes = {node.name: node for node in program.graph.nodes}
    specs = program.graph_signature.input_specs
    return [spec.target for spec in specs if spec.target in program.state_dict and nodes[spec.arg.name].users]
