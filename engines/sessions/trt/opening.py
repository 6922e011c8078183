"""Opening for TensorRT: an engine from its plan, execution contexts of it, and other weights in it by refit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import TYPE_CHECKING

from engines.sessions.checks import Checked
from engines.sessions.trt.context import BoundContext, library_reason, raises_engine_error
from sdkd.core.files import write_bytes
from sdkd.errors import EngineError
from sdkd.targets.gpu_trial import reasons
from sdkd.targets.registry import cache_folder
from sdkd.targets.tensorrt_api import ICudaEngine, ILogger, IRuntimeCache, IRuntimeConfig, Recorder, Refitter, TensorRT

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)
Failed = Callable[[str], EngineError]
"""Makes the error for a step that failed."""


def deserialize(trt: TensorRT, log: Recorder, checked: Checked, rebuild: str) -> ICudaEngine:
    """The engine of a plan.

    `log` records what the library says, `rebuild` is the command that builds the engine again. EngineError says what
    the library said.
    """
    log.messages.clear()  # earlier messages are no reason for what happens now
    plan = checked.path.read_bytes()
    runtime = trt.Runtime(log)
    if hasattr(runtime, "get_engine_validity"):
        validity, diagnostics = runtime.get_engine_validity(plan)
        if validity == trt.EngineValidity.INVALID:
            raise EngineError(
                f"{checked.label} cannot run here: {trt.__name__} {trt.__version__} says "
                f"{', '.join(reasons(trt, diagnostics))}. Rebuild it with: {rebuild}"
            )
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        words = library_reason(trt.__name__, log.messages)
        raise EngineError(f"{checked.label} was refused{words}. Rebuild it with: {rebuild}")
    return engine


class RuntimeCache:
    """What TensorRT-RTX compiled for this GPU, shared by an engine's contexts, and the file that keeps it.

    By the plan's SHA-256 among the user's caches, never in the bundle: it is native code, too, and no manifest vouches
    for it. Does nothing for libraries that compile nothing at run time.
    """

    def __init__(self, sha256: str) -> None:
        self.path = cache_folder() / "runtime" / f"{sha256}.cache"
        self._cache: IRuntimeCache | None = None
        self._kept = 0  # bytes of what the file holds
        self._saved: set[Hashable] = set()

    def attach(self, runtime_config: IRuntimeConfig) -> bool:
        """Give a runtime configuration the cache, read from its file at first; False when it was not taken."""
        if not hasattr(runtime_config, "create_runtime_cache"):
            return True
        if self._cache is None:
            self._cache = self._read(runtime_config.create_runtime_cache())
        return runtime_config.set_runtime_cache(self._cache)

    def _read(self, cache: IRuntimeCache) -> IRuntimeCache:
        if self.path.is_file():
            blob = self.path.read_bytes()
            if cache.deserialize(blob):
                self._kept = len(blob)
            else:
                log.info("%s is for another GPU, driver or version: kernels are compiled again", self.path)
        return cache

    def save_for(self, shape: Hashable) -> None:
        """Save after a run of a shape, when it is the first: that one compiles, and asking what there is takes time."""
        if self._cache is not None and shape not in self._saved:
            self._saved.add(shape)
            self.save()

    def save(self) -> None:
        """Write the cache when it grew; a read-only home only costs the next start some seconds."""
        if self._cache is None:
            return
        memory = self._cache.serialize()
        blob = b"" if memory is None else bytes(memory)
        if len(blob) <= self._kept:
            return
        try:
            write_bytes(self.path, blob)
        except OSError as error:
            log.info("the runtime cache could not be kept at %s: %s", self.path, error)
        self._kept = len(blob)


def captures_by_itself(trt: TensorRT) -> bool:
    """Whether the library's contexts can capture and replay CUDA graphs themselves."""
    return hasattr(getattr(trt, "IRuntimeConfig", None), "cuda_graph_strategy")


def open_context(
    trt: TensorRT, engine: ICudaEngine, kernels: RuntimeCache, failed: Failed, *, graphs: bool = False
) -> BoundContext:
    """An execution context, with user-managed device memory where the library has that.

    `graphs`: one for a single shape, that captures by itself if it can. EngineError says which step failed.
    """
    probe, strategies = trt.IExecutionContext, trt.ExecutionContextAllocationStrategy
    managed = hasattr(probe, "update_device_memory_size_for_shapes") and hasattr(probe, "set_device_memory")
    strategy = strategies.USER_MANAGED if managed else strategies.STATIC
    if hasattr(engine, "create_runtime_config"):
        runtime_config = engine.create_runtime_config()
        runtime_config.set_execution_context_allocation_strategy(strategy)
        if not kernels.attach(runtime_config):
            raise failed("setting the runtime cache")
        if graphs:
            configure_graphs(runtime_config, failed)
        context = engine.create_execution_context(runtime_config)
    else:
        context = engine.create_execution_context(strategy)
    if context is None:
        raise failed("creating an execution context")
    if hasattr(context, "nvtx_verbosity"):  # plans are built to name all of their layers, which slows each call
        context.nvtx_verbosity = type(context.nvtx_verbosity).NONE
    return BoundContext(context, managed, failed)


def configure_graphs(runtime_config: IRuntimeConfig, failed: Failed) -> None:
    """Make contexts that capture by themselves, and compile the kernels for a shape before they run it.

    Both are off by default, and stay so for plain runs: those have other addresses each time, and would be captured
    again, and shapes that may never come again. EngineError when one is not taken.
    """
    if hasattr(runtime_config, "cuda_graph_strategy"):
        whole = type(runtime_config.cuda_graph_strategy).WHOLE_GRAPH_CAPTURE
        runtime_config.cuda_graph_strategy = whole
        if runtime_config.cuda_graph_strategy != whole:
            raise failed("setting the CUDA graph strategy")
    if hasattr(runtime_config, "dynamic_shapes_kernel_specialization_strategy"):
        # Lazily, a fallback kernel runs at first, and may be what is captured.
        eager = type(runtime_config.dynamic_shapes_kernel_specialization_strategy).EAGER
        runtime_config.dynamic_shapes_kernel_specialization_strategy = eager
        if runtime_config.dynamic_shapes_kernel_specialization_strategy != eager:
            raise failed("setting the strategy of kernels for one shape")


# Other weights

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
