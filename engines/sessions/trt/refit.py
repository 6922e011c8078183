"""Other weights in an opened TensorRT engine: by refit where it was built for that, from a rebuilt plan where not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from engines.sessions.trt.context import raises_engine_error
from sdkd.errors import EngineError
from sdkd.targets.tensorrt_api import ICudaEngine, ILogger, Refitter, TensorRT

if TYPE_CHECKING:
    import numpy as np

KINDS = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}


class HalfRefitError(EngineError):
    """The last step of a refit failed: the engine may hold some of the new weights."""


Fill = Callable[[Collection[str]], "Mapping[str, np.ndarray]"]
"""The exported values of weights, by their names in the graph; without those that the graph does not name."""


def refit(
    trt: TensorRT, engine: ICudaEngine, logger: ILogger, stored: Mapping[str, np.ndarray], label: str, fill: Fill
) -> None:
    """Give an engine these weights, by their names in the graph, in the graph's dtypes and layout.

    `fill` gives those that TensorRT asks for besides: where it has merged weights into one, it wants all of them. Those
    that are not as exported must be in `stored`, then. The engine must not be running. EngineError names the first
    weight that the engine was not built to change, or the step that failed: HalfRefitError when that was the last.
    """
    with raises_engine_error(lambda what: EngineError(f"{label}: {what} failed"), "preparing a change of weights"):
        refitter = trt.Refitter(engine, logger)
    possible = set(refitter.get_all_weights())
    fixed = [name for name in stored if name not in possible]
    if fixed:
        raise EngineError(
            f"{label} was not built to change {len(fixed)} of {len(stored)} weights (first: {fixed[0]}): build it with "
            "--refit all"
        )
    kept = _supply(trt, refitter, stored, label)  # TensorRT reads the arrays when it refits, not before
    if missing := refitter.get_missing_weights():
        kept += _supply(trt, refitter, fill(missing), label)
        missing = refitter.get_missing_weights()
    if missing:
        raise EngineError(f"{label}: TensorRT wants {len(missing)} more weights to refit (first: {missing[0]!r})")
    if not refitter.refit_cuda_engine():
        raise HalfRefitError(f"{label}: TensorRT could not refit the engine")


def _supply(trt: TensorRT, refitter: Refitter, arrays: Mapping[str, np.ndarray], label: str) -> list[object]:
    """Name weights to a refitter; returns what must live until it has refitted."""
    kept: list[object] = []
    for name, array in arrays.items():
        if array.dtype.name not in KINDS:
            raise EngineError(f"{label}: weight {name!r} is {array.dtype}, and only {', '.join(KINDS)} can be changed")
        weights = trt.Weights(getattr(trt.DataType, KINDS[array.dtype.name]), array.ctypes.data, array.size)
        kept.append((array, weights))
        if not refitter.set_named_weights(name, weights):
            raise EngineError(f"{label}: TensorRT did not take weight {name!r} of shape {array.shape}, {array.dtype}")
    return kept
