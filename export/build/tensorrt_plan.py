"""Targets tensorrt and tensorrt-rtx: one path through Polygraphy, which knows both libraries.

Networks are strongly typed: half precision is in the ONNX graph, never a builder flag. What a library can do is found
by looking for the attribute, never by comparing version numbers. Measured with tensorrt_rtx 1.7.1, no GPU: an ONNX
`Attention` node has a fused kernel in fp16 for heads 12 to 256 wide; narrower, wider or fp32 heads build only when the
attention is marked decomposable, and marking the others changes nothing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from export.build.job import Built, Job, Run, check_io
from export.build.options import CURRENT, GIB, HARDWARE, RTX, BuildOptions
from export.build.tensorrt_progress import progress_monitor
from sdkd.core.components import TEXT_ENCODERS, UNETS
from sdkd.core.console import Progress
from sdkd.errors import BuildError
from sdkd.targets.fast_precisions import FP8_CAPABILITY
from sdkd.targets.gpu_trial import capabilities, runs_portably
from sdkd.targets.nvidia import gpu
from sdkd.targets.tensorrt_api import (
    Builder,
    IAttentionInputLayer,
    IBuilderConfig,
    INetworkDefinition,
    Member,
    TensorRT,
)

Parsed = tuple[Builder, INetworkDefinition, object]
"""A builder, its network, and the parser, which owns the weights."""
SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"
DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32"}
# Without a list of compute capabilities tensorrt_rtx builds one plan for 8.0 and all later GPUs; 7.5 must be named.
PORTABLE_FROM = (8, 0)
ACTIVATION_RESIZE = "RUNTIME_ACTIVATION_RESIZE_10_10"


def half_precision() -> str:
    """The fastest float precision of its engines."""
    return "fp16"


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
        "attention": _allow_decomposition(trt, parsed[1]),
        "activation_resize": _activation_resize(trt) is not None,
    }
    marked: tuple[str, ...] = ()
    if options.refit == "lora":
        marked = mark_weights(trt, parsed[1], lora_weights(job))
        facts["refittable_weights"] = len(marked)
    plan = _plan(trt, job, parsed, options, refit_flags(options, bool(marked)), progress)
    file = job.file(".engine")
    with file.open("wb") as stream:
        stream.write(plan)
    built_for = _built_for(trt, job.target, options, FP8_CAPABILITY if job.precision == "fp8" else PORTABLE_FROM)
    run = _runner(job, plan) if _runs_here(job, built_for) else None
    return Built((file.name,), {**facts, **_plan_facts(plan)}, built_for, run)


def _runs_here(job: Job, built_for: Sequence[str]) -> bool:
    """Whether a plan can be compared here: on a GPU that it is for, in a precision that ONNX Runtime's CPU has."""
    here = gpu()
    if here is None or (built_for and here["compute_capability"] not in built_for):
        return False
    return job.precision != "bf16"


def _runner(job: Job, plan: memoryview) -> Run:
    """Runs a plan on this GPU in Polygraphy's runner; sessions bind torch's memory instead, and copy nothing."""
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    engine = EngineFromBytes(plan)()

    def run(feeds: Mapping[str, Any]) -> list[Any]:
        # Activation memory of these shapes alone, as sessions take it.
        with TrtRunner(engine, optimization_profile=job.profile_for(feeds), allocation_strategy="runtime") as runner:
            found = runner.infer(dict(feeds))
        return [found[spec.name] for spec in job.contract.outputs]

    return run


def _library(target: str) -> TensorRT:
    """The TensorRT module of a target, the one that Polygraphy uses too: its switch is read once per process."""
    if target == RTX:
        os.environ[SWITCH] = "1"
    else:
        os.environ.pop(SWITCH, None)
    from polygraphy import config

    switched = bool(getattr(config, "USE_TENSORRT_RTX", False)) == (target == RTX)
    if not switched or (target == RTX and importlib.util.find_spec("polygraphy.backend.tensorrt_rtx") is None):
        raise BuildError(
            f"Polygraphy {importlib.metadata.version('polygraphy')} cannot build for {target}, or not in this process: "
            f"pip install -U polygraphy, and build one target per process"
        )
    return importlib.import_module("tensorrt_rtx" if target == RTX else "tensorrt")


def _parse(trt: TensorRT, job: Job) -> Parsed:
    """A strongly typed network. What the parser refuses, it logs, with node (named by its module) and operator."""
    from polygraphy.backend.trt import NetworkFromOnnxPath

    typed = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")  # without the flag there is no other kind
    parsed: Parsed = NetworkFromOnnxPath(job.onnx, strongly_typed=typed)()
    network = parsed[1]
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


def config_arguments(trt: TensorRT, options: BuildOptions) -> dict[str, Any]:
    """What Polygraphy's CreateConfig is given for the options."""
    pools = {"WORKSPACE": options.workspace_gb, "TACTIC_DRAM": options.memory_cap_gb}
    limits = {getattr(trt.MemoryPoolType, name): int(size * GIB) for name, size in pools.items() if size}
    level = HARDWARE[options.hardware_compatible]
    found: dict[str, Any] = {
        "builder_optimization_level": options.optimization_level,
        "memory_pool_limits": limits or None,
        "hardware_compatibility_level": None if level == "NONE" else getattr(trt.HardwareCompatibilityLevel, level),
    }
    if options.compute_capabilities not in ((), (CURRENT,)):
        found["compute_capabilities"] = [tuple(map(int, one.split("."))) for one in options.compute_capabilities]
    return found


def refit_flags(options: BuildOptions, marked: bool) -> tuple[str, ...]:
    """Flags for weights that can change; `marked`: some weights, and not all, were marked as refittable."""
    return {"none": (), "lora": ("REFIT_INDIVIDUAL" if marked else "REFIT",), "all": ("REFIT",)}[options.refit]


def _plan(
    trt: TensorRT, job: Job, parsed: Parsed, options: BuildOptions, flags: Sequence[str], progress: Progress
) -> memoryview:
    from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, Profile

    create: Any = CreateConfig
    if job.target == RTX:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        create = CreateConfigRTX
    profiles = [Profile() for _ in job.profiles]
    for profile, shapes in zip(profiles, job.profiles, strict=True):
        for name, (low, best, high) in shapes.items():
            profile.add(name, tuple(low), tuple(best), tuple(high))
    cache = str(Path(job.folder) / job.timing_cache) if job.timing_cache else None
    with progress_monitor(trt, progress, job.target, job.weight_bytes()) as monitor:
        made = create(
            profiles=profiles, load_timing_cache=cache, progress_monitor=monitor, **config_arguments(trt, options)
        )
        config: IBuilderConfig = made(*parsed[:2])
        set_checked(trt, config, flags, options.compute_capabilities == (CURRENT,))
        return memoryview(EngineBytesFromNetwork(parsed, config, save_timing_cache=cache)())


def set_checked(trt: TensorRT, config: IBuilderConfig, flags: Sequence[str], current: bool) -> None:
    """What Polygraphy has no argument for, or does not check: flags by name, activation memory by a call's shapes, and
    with `current` the GPU that is here alone. BuildError when the library does not take one, which it only logs.
    """

    def check(taken: bool, what: str) -> None:
        if not taken:
            raise BuildError(f"{trt.__name__} {trt.__version__} does not take {what} here: build without it")

    for name in flags:
        flag = getattr(trt.BuilderFlag, name)
        config.set_flag(flag)
        check(config.get_flag(flag), f"the flag {name}")
    if (resize := _activation_resize(trt)) is not None:
        config.set_preview_feature(resize, True)
        check(config.get_preview_feature(resize), f"the preview feature {ACTIVATION_RESIZE}")
    if current:
        config.num_compute_capabilities = 1
        taken = config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)
        check(taken, f"--compute-capability {CURRENT}")


def _activation_resize(trt: TensorRT) -> Member | None:
    """The feature without which an engine wants its largest shapes' memory for small ones, too; None in old libraries.

    From the description of update_device_memory_size_for_shapes, which sessions call, in TensorRT's API.
    """
    return getattr(getattr(trt, "PreviewFeature", None), ACTIVATION_RESIZE, None)


def _built_for(
    trt: TensorRT, target: str, options: BuildOptions, least: tuple[int, int] = PORTABLE_FROM
) -> tuple[str, ...]:
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
    portable = [one for one in capabilities(trt) if tuple(map(int, one.split("."))) >= least]
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


# Weights that may change later

# A LoRA adds to matrices and convolutions: of attention and feed-forward (LoRA), of the blocks around them (LoCon), of
# CLIP's layers. Norms, biases, time and token embeddings stay.
TOUCHED = {
    **dict.fromkeys(UNETS, r"(^|\.)((attentions|resnets|downsamplers|upsamplers)\.\d+\..*|conv_in\.|conv_out\.)"),
    **dict.fromkeys(TEXT_ENCODERS, r"\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\."),
}


def lora_weights(job: Job) -> tuple[str, ...]:
    """Names of a graph's weights that a LoRA can touch, in the graph's order; () for a component without any."""
    import onnx

    if job.component not in TOUCHED:
        return ()
    graph = onnx.load(job.onnx, load_external_data=False).graph
    return touched(job.component, {tensor.name: len(tensor.dims) for tensor in graph.initializer})


def touched(component: str, ranks: dict[str, int]) -> tuple[str, ...]:
    """Of weights by name and number of axes, those that a LoRA can touch."""
    pattern = re.compile(TOUCHED[component])
    return tuple(
        name for name, rank in ranks.items() if rank >= 2 and name.endswith(".weight") and pattern.search(name)
    )


def mark_weights(trt: TensorRT, network: INetworkDefinition, names: Sequence[str]) -> tuple[str, ...]:
    """Mark weights as refittable and return their names; () where the library cannot: all are then, which is slower.

    Raises BuildError for a name that the network does not have: a later swap would change nothing.
    """
    can_mark = hasattr(trt.INetworkDefinition, "mark_weights_refittable")
    if not (can_mark and hasattr(trt.BuilderFlag, "REFIT_INDIVIDUAL")):
        return ()
    unknown = [name for name in names if not network.mark_weights_refittable(name)]
    if unknown:
        raise BuildError(
            f"the network has lost {len(unknown)} of the {len(names)} weights that a LoRA can touch, first "
            f"{unknown[0]!r}: export the model again, or build with --refit all"
        )
    return tuple(names)
