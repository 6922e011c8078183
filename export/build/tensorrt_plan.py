"""Targets tensorrt and tensorrt-rtx: one path through Polygraphy, which knows both libraries.

Networks are strongly typed: half precision is in the ONNX graph, never a builder flag. What a library can do is found
by looking for the attribute, never by comparing version numbers. Measured with tensorrt_rtx 1.7.1, no GPU: an ONNX
`Attention` node has a fused kernel in fp16 for heads 12 to 256 wide; narrower, wider or fp32 heads build only when the
attention is marked decomposable, and marking the others changes nothing.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from export.build.errors import advice_for
from export.build.job import Built, Job, Run, check_io
from export.build.options import CURRENT, GIB, HARDWARE, RTX, BuildOptions, lean_runtime
from export.build.tensorrt_parser import parser_errors
from export.build.tensorrt_progress import progress_monitor
from export.build.tensorrt_refit import has_marks, lora_weights, mark_weights
from sdkd.core.console import Progress
from sdkd.errors import BuildError, MissingExtraError
from sdkd.targets.gpu_trial import capabilities, runs_portably
from sdkd.targets.registry import gpu
from sdkd.targets.tensorrt_api import (
    Builder,
    IAttentionInputLayer,
    IBuilderConfig,
    ICudaEngine,
    INetworkDefinition,
    Member,
    TensorRT,
)

T = TypeVar("T")

SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"
DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32"}
# Without a list of compute capabilities tensorrt_rtx builds one plan for 8.0 and all later GPUs; 7.5 must be named.
PORTABLE_FROM = (8, 0)
ACTIVATION_RESIZE = "RUNTIME_ACTIVATION_RESIZE_10_10"


def flags(engine_precision: str, onnx_precision: str) -> dict[str, Any]:
    """Options of the build: TF32 is off, so that fp32 means fp32."""
    return {"strongly_typed": True, "tf32": False}


def build(job: Job, progress: Progress) -> Built:
    """Build <component>.engine with all of the job's optimization profiles, to be run where a GPU is there for it.

    Raises BuildError or Polygraphy's exception when the parser or the builder refuses the graph.
    """
    trt = _library(job.target)
    options = BuildOptions.of(job.flags.get("options", {}))
    progress("parsing the graph", 0.0)
    parsed = _parse(trt, job)
    # A record, no condition: engines without them run as well, and only take more memory.
    facts: dict[str, Any] = {
        "attention": _allow_decomposition(trt, parsed.network),
        "activation_resize": _activation_resize(trt) is not None,
    }
    marked = mark_weights(trt, parsed.network, lora_weights(job)) if options.refit == "lora" else ()
    if options.refit == "lora":
        facts["refittable_weights"] = len(marked)
    plan = _plan(trt, job, parsed, config_arguments(trt, options, bool(marked)), progress)
    file = job.file(".engine")
    with file.open("wb") as stream:
        stream.write(plan)
    built_for = _built_for(trt, job.target, options)
    run = _runner(trt, job, plan) if _runs_here(job, options, built_for) else None
    return Built((file.name,), {**facts, **_plan_facts(plan)}, built_for, run)


def _runs_here(job: Job, options: BuildOptions, built_for: Sequence[str]) -> bool:
    """Whether a plan can be compared where it was built: on a GPU that it is for, with weights of its own on it, and in
    a precision that ONNX Runtime has on the CPU.
    """
    here = gpu()
    if here is None or (built_for and here["compute_capability"] not in built_for):
        return False
    return not options.strip_weights and not options.weight_streaming and job.precision != "bf16"


def _runner(trt: TensorRT, job: Job, plan: memoryview) -> Run:
    """Runs a plan on this GPU, with the activation memory that a call's shapes need where the library says how much.

    BuildError names the step that the library refuses.
    """
    import torch
    from polygraphy.backend.trt import EngineFromBytes

    def checked(answer: T | None, what: str) -> T:
        if answer is None or answer is False:
            raise BuildError(f"{job.component} was built for {job.target}, but {what} failed here: it was not kept")
        return answer

    probe, strategies = trt.IExecutionContext, trt.ExecutionContextAllocationStrategy
    managed = hasattr(probe, "update_device_memory_size_for_shapes") and hasattr(probe, "set_device_memory")
    engine: ICudaEngine = EngineFromBytes(plan)()
    context = checked(
        engine.create_execution_context(strategies.USER_MANAGED if managed else strategies.STATIC),
        "creating an execution context",
    )

    def run(feeds: Mapping[str, Any]) -> list[Any]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            tensors = {name: torch.from_numpy(array).cuda() for name, array in feeds.items()}
            profile = _profile_of(job, feeds)
            checked(context.set_optimization_profile_async(profile, stream.cuda_stream), "selecting a profile")
            for name, tensor in tensors.items():
                checked(context.set_input_shape(name, tuple(tensor.shape)), f"setting the shape of {name!r}")
            for spec in job.contract.outputs:
                shape, dtype = tuple(context.get_tensor_shape(spec.name)), getattr(torch, spec.dtype)
                tensors[spec.name] = torch.empty(shape, dtype=dtype, device="cuda")
            for name, tensor in tensors.items():
                checked(context.set_tensor_address(name, tensor.data_ptr()), f"binding {name!r}")
            if managed:
                needed = context.update_device_memory_size_for_shapes()
                needed = needed or engine.get_device_memory_size_for_profile_v2(profile)
                workspace = torch.empty(needed, dtype=torch.uint8, device="cuda")
                context.set_device_memory(workspace.data_ptr(), needed)
            checked(context.execute_async_v3(stream.cuda_stream), "running it")
            stream.synchronize()
        return [tensors[spec.name].cpu().numpy() for spec in job.contract.outputs]

    return run


def _profile_of(job: Job, feeds: Mapping[str, Any]) -> int:
    """The first profile that holds the inputs' shapes."""

    def holds(profile: Mapping[str, Any]) -> bool:
        shapes = ((array.shape, profile[name]) for name, array in feeds.items())
        return all(
            low <= size <= high
            for shape, (least, _, most) in shapes
            for low, size, high in zip(least, shape, most, strict=True)
        )

    return next(index for index, profile in enumerate(job.profiles) if holds(profile))


@dataclass(frozen=True)
class _Parsed:
    builder: Builder
    network: INetworkDefinition
    parser: object  # owns the weights


def _library(target: str) -> TensorRT:
    """The TensorRT module of a target, the one that Polygraphy uses too: its switch is read once per process."""
    if target == RTX:
        os.environ[SWITCH] = "1"
    else:
        os.environ.pop(SWITCH, None)
    try:
        from polygraphy import config
    except ImportError as error:
        raise MissingExtraError("polygraphy", target, f"target {target!r}") from error
    switched = bool(getattr(config, "USE_TENSORRT_RTX", False)) == (target == RTX)
    if not switched or (target == RTX and importlib.util.find_spec("polygraphy.backend.tensorrt_rtx") is None):
        raise BuildError(
            f"Polygraphy {importlib.metadata.version('polygraphy')} cannot build for {target}, or not in this process: "
            f"pip install -U polygraphy, and build one target per process"
        )
    return importlib.import_module("tensorrt_rtx" if target == RTX else "tensorrt")


def _parse(trt: TensorRT, job: Job) -> _Parsed:
    """A strongly typed network; BuildError with node, inputs and module path when the parser refuses the graph."""
    from polygraphy.backend.trt import NetworkFromOnnxPath
    from polygraphy.exception import PolygraphyException

    typed = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")  # without the flag there is no other kind
    try:
        parsed = _Parsed(*NetworkFromOnnxPath(job.onnx, strongly_typed=typed)())
    except PolygraphyException as error:
        if said := parser_errors(trt, job, typed):
            text = f"{job.component} could not be built for {job.target}: {said}"
            raise BuildError(f"{text}. Try this: {advice_for(said)}") from error
        raise
    network = parsed.network
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    check_io(job, *({t.name: DTYPES.get(t.dtype.name, t.dtype.name) for t in side} for side in (inputs, outputs)))
    return parsed


def _allow_decomposition(trt: TensorRT, network: INetworkDefinition) -> str:
    """Let attention without a fused kernel be MatMul and Softmax; returns what the record says of it."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    if kind is None or not hasattr(trt, "IAttentionInputLayer"):
        return "as the library chooses"
    layers = (network.get_layer(index) for index in range(network.num_layers))
    found = [cast(IAttentionInputLayer, layer) for layer in layers if layer.type == kind]
    for layer in found:
        layer.__class__ = trt.IAttentionInputLayer  # how the bindings cast a layer to its own type
        layer.attention.decomposable = True
    return f"{len(found)} attention layers, fused where a kernel exists"


def config_arguments(trt: TensorRT, options: BuildOptions, marked: bool = False) -> dict[str, Any]:
    """What Polygraphy's CreateConfig is given for the options, and what it has no argument for, or does not check.

    Under `flags`: names of flags; under `current`: whether the plan is for this machine's GPU alone.

    `marked`: whether some weights, and not all, were marked as refittable.
    """
    pools = {"WORKSPACE": options.workspace_gb, "TACTIC_DRAM": options.memory_cap_gb}
    limits = {getattr(trt.MemoryPoolType, name): int(size * GIB) for name, size in pools.items() if size}
    streaming = {"weight_streaming": True} if options.weight_streaming else {}
    level = HARDWARE[options.hardware_compatible]
    names = [
        *(["REFIT_INDIVIDUAL"] if marked else []),
        *(["REFIT"] if options.refit == "all" or (options.refit == "lora" and not has_marks(trt)) else []),
        # The weights of the same model come back: nothing else must stay refittable, which would cost speed.
        *(["REFIT_IDENTICAL"] if options.strip_weights and options.refit == "none" else []),
    ]
    found: dict[str, Any] = {
        "builder_optimization_level": options.optimization_level,
        "memory_pool_limits": limits or None,
        "strip_plan": options.strip_weights,
        "version_compatible": options.version_compatible or None,
        "hardware_compatibility_level": None if level == "NONE" else getattr(trt.HardwareCompatibilityLevel, level),
        **streaming,
        "flags": names,
        "current": options.compute_capabilities == (CURRENT,),
    }
    if options.compute_capabilities and not found["current"]:
        found["compute_capabilities"] = [tuple(map(int, one.split("."))) for one in options.compute_capabilities]
    return found


def _plan(trt: TensorRT, job: Job, parsed: _Parsed, arguments: dict[str, Any], progress: Progress) -> memoryview:
    from polygraphy.backend.trt import EngineBytesFromNetwork, Profile

    profiles = [Profile() for _ in job.profiles]
    for profile, shapes in zip(profiles, job.profiles, strict=True):
        for name, (low, best, high) in shapes.items():
            profile.add(name, tuple(low), tuple(best), tuple(high))
    cache = str(Path(job.folder) / job.timing_cache) if job.timing_cache else None
    names, current = arguments.pop("flags"), arguments.pop("current")
    if arguments["version_compatible"] and (lean := lean_runtime(trt.__name__)):
        ctypes.CDLL(str(lean), mode=ctypes.RTLD_GLOBAL)  # the builder looks for it by name, and pip puts it elsewhere
    with progress_monitor(trt, progress, job.target, job.weight_bytes()) as monitor:
        create = _create_config(job.target)(
            profiles=profiles, load_timing_cache=cache, progress_monitor=monitor, **arguments
        )
        config: IBuilderConfig = create(parsed.builder, parsed.network)
        _set_flags(trt, config, names)
        if current:
            _set_current(trt, config)
        found = (parsed.builder, parsed.network, parsed.parser)
        return memoryview(EngineBytesFromNetwork(found, config, save_timing_cache=cache)())


def _set_flags(trt: TensorRT, config: IBuilderConfig, names: Sequence[str]) -> None:
    """TF32 off, the named flags on, activation memory by a call's shapes where the library has that.

    BuildError when the library does not take a flag, which it only logs.
    """
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)
    for name in names:
        flag = getattr(trt.BuilderFlag, name)
        config.set_flag(flag)
        if not config.get_flag(flag):
            raise BuildError(f"{trt.__name__} {trt.__version__} does not take the flag {name} here")
    if (resize := _activation_resize(trt)) is not None:
        config.set_preview_feature(resize, True)
        if not config.get_preview_feature(resize):
            raise BuildError(f"{trt.__name__} {trt.__version__} does not take the preview feature {ACTIVATION_RESIZE}")


def _set_current(trt: TensorRT, config: IBuilderConfig) -> None:
    """A plan for the GPU that is here alone; BuildError when the library says no, which Polygraphy does not look at."""
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(trt.ComputeCapability.CURRENT, 0):
        raise BuildError(
            f"{trt.__name__} {trt.__version__} does not build for this GPU alone: leave out --compute-capability, or "
            "name generations"
        )


def _activation_resize(trt: TensorRT) -> Member | None:
    """The feature without which an engine wants its largest shapes' memory for small ones, too; None in old libraries.

    From the description of update_device_memory_size_for_shapes, which sessions call, in TensorRT's API.
    """
    return getattr(getattr(trt, "PreviewFeature", None), ACTIVATION_RESIZE, None)


def _create_config(target: str) -> Any:
    if target == RTX:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        return CreateConfigRTX
    from polygraphy.backend.trt import CreateConfig

    return CreateConfig


def _built_for(trt: TensorRT, target: str, options: BuildOptions) -> tuple[str, ...]:
    """Compute capabilities that an ahead-of-time plan runs on: those asked for, or all later ones that this library
    knows, and this GPU's where `sdkd doctor --try` has shown that such a plan runs; () for one GPU's plan.
    """
    if target != RTX:
        return ()
    if options.compute_capabilities == (CURRENT,):
        device = gpu()
        assert device, "a plan for the GPU that is here was built without one"
        return (device["compute_capability"],)
    if options.compute_capabilities:
        return options.compute_capabilities
    portable = [one for one in capabilities(trt) if tuple(map(int, one.split("."))) >= PORTABLE_FROM]
    tried = runs_portably(target)
    return tuple(portable if not tried or tried in portable else (*portable, tried))


def _plan_facts(plan: memoryview) -> dict[str, Any]:
    """What the plan's own header says of the GPUs it is for; nothing when it has no such header."""
    head = bytes(plan[: 1 << 22])
    found = re.search(rb"accelerators=\{((?:sm\d+ ?)+)\}", head)
    forward = re.search(rb"hardware_forward_compatibility=([01])", head)
    if not found or not forward:
        return {}
    return {"plan_accelerators": found[1].decode().split(), "plan_forward_compatible": forward[1] == b"1"}
