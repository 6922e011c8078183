"""Whether an engine computes what its ONNX graph does: both run on the same seeded inputs, at one or two shapes.

Not by Polygraphy's Comparator: ONNX Runtime and OpenVINO are installed without it, and a slow graph runs once only.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sdkd.core.console import Progress
from sdkd.core.contract import Contract, TensorSpec
from sdkd.errors import ValuesError

if TYPE_CHECKING:
    import numpy as np

    from export.build.job import Job, Run

SEED = 20
TIMESTEP = 981.0  # one of the first of a scheduler: rounded to bfloat16, it would be another
TOKENS = 400  # ids below any vocabulary's size
SLOW_SECONDS = 10.0  # the second shape is left out when the graph alone takes longer than this
# ||engine - graph|| / ||graph|| that rounding explains: half the mantissa's steps, grown over some hundred layers.
RELATIVE_LIMIT = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 1e-1}
RELATIVE_LIMIT |= {"int8": 5e-2}  # of rounded weights alone; a UNet's gate is `export.build.quantized`'s


def check_engine(job: Job, run: Run, progress: Progress, reference: Run | None = None) -> dict[str, Any]:
    """Compare a saved engine with its ONNX graph in onnxruntime (CPU, no graph optimisation), or another reference.

    Returns max_abs (absolute), relative (L2), cosine, finite and the shapes compared: the worst over outputs and
    shapes. Raises ValuesError when a value is not finite or the relative error is over the precision's limit.
    """
    from export.build.onnxruntime_graph import open_reference

    progress("opening the ONNX graph to compare with", 0.0)
    reference = reference or open_reference(job.onnx)
    rows: list[dict[str, Any]] = []
    shapes: list[str] = []
    for sizes in job.checks:
        feeds = seeded_inputs(job, sizes)
        progress(f"comparing at {shape_words(job, sizes)}", len(shapes) / len(job.checks))
        start = time.perf_counter()
        expected = reference(feeds)
        seconds = time.perf_counter() - start
        rows += [compare(a, b) for a, b in zip(run(feeds), expected, strict=True)]
        shapes.append(shape_words(job, sizes))
        if seconds > SLOW_SECONDS:
            break
    return verdict(job, rows, shapes, RELATIVE_LIMIT[job.precision])


def verdict(
    job: Job, rows: list[dict[str, Any]], where: list[str], limit: float, advice: str = "another --precision or target"
) -> dict[str, Any]:
    """The worst of the rows of `compare`; ValuesError for NaN, infinity or a relative error over the limit.

    `where`: each row's shape or timestep, in words; `advice`: what to build instead.
    """
    name = f"the {job.target} engine of {job.component} ({job.precision})"
    finite = all(row["finite"] for row in rows)
    if not finite:
        raise ValuesError(
            f"{name} gives NaN or infinity at {', '.join(where)}: it was not kept; "
            f"export and build it in fp32, or in bf16"
        )
    worst = {"max_abs": max(row["max_abs"] for row in rows), "relative": max(row["relative"] for row in rows)}
    if worst["relative"] > limit:
        raise ValuesError(
            f"{name} is {worst['relative']:.2g} (relative) from its ONNX graph at {', '.join(where)}, more than "
            f"{limit:g}: it was not kept; build it with {advice}"
        )
    return {**worst, "cosine": min(row["cosine"] for row in rows), "finite": finite, "shapes": where}


def compare(found: np.ndarray, expected: np.ndarray) -> dict[str, Any]:
    """Error figures of one output, computed in float64; figures are 0 when a value is not finite."""
    import numpy as np

    a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return {"max_abs": 0.0, "relative": 0.0, "cosine": 0.0, "finite": False}
    norm = float(np.linalg.norm(b)) or 1.0
    cosine = float(a @ b) / ((float(np.linalg.norm(a)) or 1.0) * norm)
    error = {"max_abs": float(np.abs(a - b).max()), "relative": float(np.linalg.norm(a - b)) / norm}
    return {**error, "cosine": cosine if b.any() else 1.0, "finite": True}


def seeded_inputs(job: Job, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Inputs of a component at these axis sizes: see `seeded_tensors`."""
    return seeded_tensors(job.contract, {spec.name: spec.shape(sizes) for spec in job.contract.inputs})


def seeded_tensors(contract: Contract, shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Inputs of these shapes, the same on every machine: normal values, token ids, timestep 981."""
    import ml_dtypes  # noqa: F401 - numpy has no bfloat16 of its own
    import numpy as np

    generator = np.random.default_rng(SEED)

    def values(spec: TensorSpec) -> np.ndarray:
        shape = tuple(shapes[spec.name])
        if spec.dtype.startswith("int"):
            return generator.integers(0, TOKENS, shape).astype(spec.dtype)
        if not shape or spec.name == "timestep":
            return np.full(shape, TIMESTEP, dtype=spec.dtype)
        return generator.standard_normal(shape).astype(spec.dtype)

    return {spec.name: values(spec) for spec in contract.inputs}


def shape_words(job: Job, sizes: Mapping[str, int]) -> str:
    """A job's first input at these axis sizes: 2x4x64x64."""
    return "x".join(str(size) for size in job.contract.inputs[0].shape(sizes))
