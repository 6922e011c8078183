"""Opening for TensorRT: an engine from its plan, and execution contexts of it."""

from __future__ import annotations

from collections.abc import Callable

from engines.sessions.checks import Checked
from engines.sessions.trt.context import BoundContext, library_reason
from engines.sessions.trt.runtime_cache import RuntimeCache
from sdkd.errors import EngineError
from sdkd.targets.gpu_trial import reasons
from sdkd.targets.tensorrt_api import ICudaEngine, IRuntimeConfig, Recorder, TensorRT

Failed = Callable[[str], EngineError]
"""Makes the error for a step that failed."""


def deserialize(trt: TensorRT, log: Recorder, checked: Checked, rebuild: str, failed: Failed) -> ICudaEngine:
    """The engine of a plan.

    `log` records what the library says, `rebuild` is the command that builds the engine again. EngineError says which
    step failed, and what the library said.
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
