"""The gate that an exported graph passes before it enters a bundle: it must compute what PyTorch computes.

Four stages, in order; each reports all of its findings at once: names -> axes -> shapes -> values. The graph runs in
onnxruntime on the CPU, at several timesteps, batch sizes and image shapes that differ from those it was traced with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from export.check.half_products import has_units, quick_half
from export.check.onnx_run import PURPOSE, GraphSession, first_line, open_graph, read_signature, runtime_errors
from export.graph.components import axis_sizes, example_inputs
from sdkd.core.contract import Contract, Precision, TensorSpec, split_axis, torch_dtype
from sdkd.errors import AxesError, NamesError, ParityError, ShapesError, ValuesError
from sdkd.targets.registry import require

# float32: onnxruntime and PyTorch add in another order; what is left is 1e-6 of the output's largest value on tiny
# models and below 1e-4 on full-size ones, while a wrong weight, mask or approximation of GELU (1e-3) is above.
FLOAT_LIMIT = 3e-4
# Half precision: the graph's distance from float32 against that of eager PyTorch in the same precision.
HALF_FACTOR = 1.5
# Below a few rounding steps of the output's largest value distances say nothing.
HALF_FLOOR: dict[Precision, float] = {"fp16": 2.0**-10, "bf16": 2.0**-7}

# What onnxruntime's CPU does with each precision: it has few float16 kernels and no bfloat16 ones.
COMPUTES: dict[Precision, str] = {
    "fp32": "in float32",
    "fp16": "float16 tensors, operators without such a kernel between casts to float32",
    "bf16": "as the float32 twin of the graph, with the rounded weights",
}

# How the products of eager half precision were computed, by whether this CPU has units for it.
PRODUCTS = {True: "by the CPU's half-precision units", False: "in float32, rounded once"}


@dataclass(frozen=True)
class Case:
    """One comparison: axis sizes, timestep (used by the UNet only) and the seed of its inputs."""

    sizes: Mapping[str, int]
    timestep: float
    seed: int

    def __str__(self) -> str:
        return ", ".join(f"{axis} {size}" for axis, size in self.sizes.items() if split_axis(axis)[1] == 1)


@dataclass(frozen=True)
class Reference:
    """What PyTorch gives for one case: in float32, and in the graph's own precision (the same tensors for fp32)."""

    case: Case
    inputs: tuple[torch.Tensor, ...]  # in the contract's dtypes
    float32: tuple[torch.Tensor, ...]
    eager: tuple[torch.Tensor, ...]


# Batch 1 (which an exporter may take for a constant), 2 and 3, and as many images of an IP-Adapter; two shapes, neither
# square; first and last timestep of training, and one between two, which schedulers ask for.
_BASES = (((1, 2, 3, 5, 2), 1.0), ((2, 3, 3, 2, 1), 500.5), ((3, 77, 2, 3, 3), 999.0))


def parity_cases(contract: Contract, config: Mapping[str, Any]) -> tuple[Case, ...]:
    """The comparisons for a component: axis sizes in multiples that its down-sampling allows."""
    longest = int(config.get("max_position_embeddings", 77))

    def case(seed: int, sizes: tuple[int, ...], timestep: float) -> Case:
        roots = dict(zip(("batch", "sequence", "height", "width", "images"), sizes, strict=True))
        return Case(axis_sizes(contract, config, roots | {"sequence": min(roots["sequence"], longest)}), timestep, seed)

    return tuple(case(seed, *base) for seed, base in enumerate(_BASES, start=1))


def case_inputs(contract: Contract, case: Case, config: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """Seeded inputs of a case in the contract's order and dtypes; token ids cover the vocabulary."""
    tokens = int(config.get("vocab_size", 256))
    return example_inputs(contract, case.sizes, case.seed, case.timestep, tokens)


@torch.no_grad()
def run_eager(
    module: nn.Module, inputs: Iterable[tuple[torch.Tensor, ...]], dtype: torch.dtype
) -> list[tuple[torch.Tensor, ...]]:
    """Outputs of a graph module in `dtype` for each case, as float32.

    In half precision inputs stay what the contract says, such as timesteps in float32. On a CPU without units for
    `dtype`, products are computed in float32 and rounded: PyTorch's own loops would take minutes.
    """

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() if tensor.is_floating_point() and dtype == torch.float32 else tensor

    with quick_half(dtype):
        return [tuple(output.float() for output in module(*map(cast, row))) for row in inputs]


def check_graph(
    onnx_file: Path, contract: Contract, references: Sequence[Reference], precision: Precision
) -> dict[str, Any]:
    """Run all stages; the figures of the values, ready for the manifest.

    Raises NamesError, AxesError, ShapesError or ValuesError, each with every finding of its stage.
    """
    found = read_signature(onnx_file, contract.component)
    check_names(contract, found)
    check_axes(contract, found)
    with open_graph(onnx_file, precision) as session:
        outputs = check_shapes(contract, session, references)
    return check_values(contract, references, outputs, precision)


def _report(kind: type[ParityError], contract: Contract, rule: str, findings: Sequence[str]) -> None:
    if findings:
        raise kind(f"the ONNX graph of {contract.component} {rule}: {'; '.join(findings)}")


def _sides(contract: Contract, found: Contract) -> tuple[tuple[str, Sequence[TensorSpec], Sequence[TensorSpec]], ...]:
    return ("inputs", contract.inputs, found.inputs), ("outputs", contract.outputs, found.outputs)


def check_names(contract: Contract, found: Contract) -> None:
    """NamesError unless inputs and outputs have the contract's names, order and dtypes."""
    findings = []
    for side, wanted, present in _sides(contract, found):
        if (want := [spec.name for spec in wanted]) != (have := [spec.name for spec in present]):
            findings.append(f"{side} are {', '.join(have)} instead of {', '.join(want)}")
            continue
        findings += [
            f"{want.name} is {have.dtype} instead of {want.dtype}"
            for want, have in zip(wanted, present, strict=True)
            if want.dtype != have.dtype
        ]
    _report(NamesError, contract, "does not have the contract's tensors", findings)


def check_axes(contract: Contract, found: Contract) -> None:
    """AxesError unless every axis is dynamic under the contract's name, or fixed at the contract's size."""
    findings = [
        f"{want.name} has axes [{', '.join(map(str, have.axes))}] instead of [{', '.join(map(str, want.axes))}]"
        for _, wanted, present in _sides(contract, found)
        for want, have in zip(wanted, present, strict=True)
        if want.axes != have.axes
    ]
    _report(AxesError, contract, "does not have the contract's axes", findings)


def check_shapes(
    contract: Contract, session: GraphSession, references: Sequence[Reference]
) -> list[tuple[torch.Tensor, ...]]:
    """Run every case; ShapesError when one does not run or gives another shape than PyTorch. Returns the outputs."""
    findings, results = [], []
    for reference in references:
        try:
            outputs = session.run(reference.inputs)
        except runtime_errors() as error:
            findings.append(f"at {reference.case} it does not run ({first_line(error)})")
            continue
        results.append(outputs)
        findings += [
            f"at {reference.case} {spec.name} is {list(output.shape)} instead of {list(expected.shape)}"
            for spec, output, expected in zip(contract.outputs, outputs, reference.float32, strict=True)
            if output.shape != expected.shape
        ]
    _report(ShapesError, contract, "fails at other sizes than it was traced with", findings)
    return results


def check_references(contract: Contract, references: Sequence[Reference], precision: Precision) -> None:
    """ValuesError where PyTorch's own answers are not finite: no graph of it could pass, so none need be traced."""
    findings = [
        f"{spec.name} at {reference.case}: {problem}"
        for reference in references
        for spec, exact, eager in zip(contract.outputs, reference.float32, reference.eager, strict=True)
        if (problem := _not_finite(exact, eager, precision))
    ]
    if findings:
        raise ValuesError(f"{contract.component} was not exported: {'; '.join(findings)}")


def check_values(
    contract: Contract,
    references: Sequence[Reference],
    outputs: Sequence[tuple[torch.Tensor, ...]],
    precision: Precision,
) -> dict[str, Any]:
    """ValuesError when a value is not finite or further from PyTorch than the precision explains; else the figures.

    PyTorch's own answers are finite: see `check_references`.
    """
    rows, findings = [], []
    for reference, found in zip(references, outputs, strict=True):
        for spec, value, exact, eager in zip(contract.outputs, found, reference.float32, reference.eager, strict=True):
            where = f"{spec.name} at {reference.case}"
            if not torch.isfinite(value).all():
                findings.append(f"{where}: the graph gives NaN or infinity, PyTorch does not")
                continue
            row = {"output": spec.name, **_figures(value, exact, eager)}
            rows.append(row)
            if problem := _too_far(row, precision):
                findings.append(f"{where}: {problem}")
    _report(ValuesError, contract, "does not compute what PyTorch does", findings)
    return _summary(rows, references, precision)


def _not_finite(exact: torch.Tensor, eager: torch.Tensor, precision: Precision) -> str | None:
    if not torch.isfinite(exact).all():
        return "PyTorch itself gives NaN or infinity in float32; the model's weights are damaged"
    if not torch.isfinite(eager).all():
        return f"PyTorch itself gives NaN or infinity in {precision}; export with --precision bf16 or fp32"
    return None


def _figures(value: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor) -> dict[str, float]:
    """Distances from float32 PyTorch, in double precision; `scale` is the output's largest absolute value."""
    a, b, c = value.double(), exact.double(), eager.double()
    norms = float(a.norm() * b.norm())
    return {
        "scale": float(b.abs().max()),
        "max_abs": float((a - b).abs().max()),
        "rms": float((a - b).square().mean().sqrt()),
        "eager_max_abs": float((c - b).abs().max()),
        "eager_rms": float((c - b).square().mean().sqrt()),
        "cosine": float((a * b).sum()) / norms if norms else 1.0,
    }


def _too_far(row: Mapping[str, Any], precision: Precision) -> str | None:
    if precision == "fp32":
        limit = FLOAT_LIMIT * row["scale"]
        if row["max_abs"] <= limit:
            return None
        return f"max error {row['max_abs']:.2g}, more than {FLOAT_LIMIT:g} of the largest value {row['scale']:.3g}"
    floor = HALF_FLOOR[precision] * row["scale"]
    for kind in ("max_abs", "rms"):
        limit = HALF_FACTOR * row[f"eager_{kind}"] + floor
        if not row[kind] <= limit:
            return (
                f"{kind} {row[kind]:.2g} from float32, more than {HALF_FACTOR:g} times eager {precision}'s "
                f"{row[f'eager_{kind}']:.2g}"
            )
    return None


def _summary(
    rows: Sequence[Mapping[str, Any]], references: Sequence[Reference], precision: Precision
) -> dict[str, Any]:
    def worst(key: str) -> float:
        return max(row[key] for row in rows)

    figures: dict[str, Any] = {
        "max_abs": worst("max_abs"),
        "relative": max(row["max_abs"] / (row["scale"] or 1.0) for row in rows),
        "rms": worst("rms"),
        "cosine": min(row["cosine"] for row in rows),
        "finite": True,
        "cases": [{**reference.case.sizes, "timestep": reference.case.timestep} for reference in references],
        "runtime": f"onnxruntime {require('onnxruntime', PURPOSE).__version__} CPU, {COMPUTES[precision]}",
    }
    if precision != "fp32":
        figures |= {"eager_max_abs": worst("eager_max_abs"), "eager_rms": worst("eager_rms")}
        figures["eager_products"] = PRODUCTS[has_units(torch_dtype(precision))]
    return figures
