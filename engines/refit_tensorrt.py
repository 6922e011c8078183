"""Other weights in an opened TensorRT engine: by refit where it was built for that, from a rebuilt plan where not."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sdkd.errors import EngineError

if TYPE_CHECKING:
    import numpy as np

KINDS = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}


def refit(trt: ModuleType, engine: Any, logger: Any, stored: Mapping[str, np.ndarray], label: str) -> None:
    """Give an engine these weights, by their names in the graph, in the graph's dtypes and layout.

    The engine must not be running. EngineError names the first weight that the engine was not built to change, or the
    step that failed; an engine whose last step failed may hold some of the weights.
    """
    refitter = trt.Refitter(engine, logger)
    possible = set(refitter.get_all_weights())
    fixed = [name for name in stored if name not in possible]
    if fixed:
        raise EngineError(
            f"{label} was not built to change {len(fixed)} of {len(stored)} weights (first: {fixed[0]}): build it with "
            "--refit all"
        )
    kept = []  # TensorRT reads the arrays when it refits, not before
    for name, array in stored.items():
        kind = getattr(trt.DataType, KINDS[array.dtype.name])
        weights = trt.Weights(kind, array.ctypes.data, array.size)
        kept.append((array, weights))
        if not refitter.set_named_weights(name, weights):
            raise EngineError(f"{label}: TensorRT did not take weight {name!r} of shape {array.shape}, {array.dtype}")
    if missing := refitter.get_missing_weights():
        raise EngineError(f"{label}: TensorRT wants {len(missing)} more weights to refit (first: {missing[0]})")
    if not refitter.refit_cuda_engine():
        raise EngineError(f"{label}: TensorRT could not refit the engine")
