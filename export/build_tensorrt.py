"""Targets tensorrt and tensorrt-rtx: one path through Polygraphy, which knows both libraries.

Networks are strongly typed: half precision is in the ONNX graph, never a builder flag. What a library can do is found
by looking for the attribute, never by comparing version numbers. Measured with tensorrt_rtx 1.7.1, no GPU: an ONNX
`Attention` node has a fused kernel in fp16 for heads 12 to 256 wide; narrower, wider or fp32 heads build only when the
attention is marked decomposable, and marking the others changes nothing.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from export.build_job import Built, Job, check_io
from export.build_progress import progress_monitor
from sdkd.console import Progress
from sdkd.errors import BuildError, MissingExtraError

RTX = "tensorrt-rtx"
SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"
DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32"}
# Without a list of compute capabilities tensorrt_rtx builds one plan for 8.0 and all later GPUs; 7.5 must be named.
PORTABLE_FROM = (8, 0)


def flags(engine_precision: str, onnx_precision: str) -> dict[str, Any]:
    """Options of the build: TF32 is off, so that fp32 means fp32."""
    return {"strongly_typed": True, "tf32": False}


def build(job: Job, progress: Progress) -> Built:
    """Build <component>.engine with all of the job's optimization profiles; it is not opened (that needs the GPU).

    Raises BuildError or Polygraphy's exception when the parser or the builder refuses the graph.
    """
    trt = _library(job.target)
    progress("parsing the graph", 0.0)
    network = _network(trt, job)
    plan = _plan(trt, job, network, progress)
    file = job.file(".engine")
    with file.open("wb") as stream:
        stream.write(plan)
    facts = {"attention": network[2], **_plan_facts(plan)}
    return Built((file.name,), facts, _built_for(trt, job.target))


def _library(target: str) -> ModuleType:
    """The TensorRT module of a target, the one that Polygraphy uses too: its switch is read once per process."""
    if target == RTX:
        os.environ[SWITCH] = "1"
    else:
        os.environ.pop(SWITCH, None)
    try:
        from polygraphy import config
    except ImportError as error:
        raise MissingExtraError("polygraphy", target, f"target {target!r}") from error
    if bool(getattr(config, "USE_TENSORRT_RTX", False)) != (target == RTX):
        raise BuildError(
            f"this Polygraphy cannot build for {target} in this process: pip install -U 'sdkd[{target}]', "
            f"and build one target per process"
        )
    import importlib

    return importlib.import_module("tensorrt_rtx" if target == RTX else "tensorrt")


def _network(trt: ModuleType, job: Job) -> tuple[Any, Any, str, Any]:
    """Builder, strongly typed network, how attention is done, and the parser (it owns the weights)."""
    from polygraphy.backend.trt import NetworkFromOnnxPath

    typed = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")  # without the flag there is no other kind
    builder, network, parser = NetworkFromOnnxPath(job.onnx, strongly_typed=typed)()
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    check_io(job, *({t.name: DTYPES.get(t.dtype.name, t.dtype.name) for t in side} for side in (inputs, outputs)))
    return builder, network, _allow_decomposition(trt, network), parser


def _allow_decomposition(trt: ModuleType, network: Any) -> str:
    """Let attention without a fused kernel be MatMul and Softmax; returns what the record says of it."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    if kind is None or not hasattr(trt, "IAttentionInputLayer"):
        return "as the library chooses"
    layers = (network.get_layer(index) for index in range(network.num_layers))
    found = [layer for layer in layers if layer.type == kind]
    for layer in found:
        layer.__class__ = trt.IAttentionInputLayer  # how the bindings cast a layer to its own type
        layer.attention.decomposable = True
    return f"{len(found)} attention layers, fused where a kernel exists"


def _plan(trt: ModuleType, job: Job, network: tuple[Any, Any, str, Any], progress: Progress) -> memoryview:
    from polygraphy.backend.trt import EngineBytesFromNetwork, Profile

    builder, definition, _, parser = network
    profiles = [Profile() for _ in job.profiles]
    for profile, shapes in zip(profiles, job.profiles, strict=True):
        for name, (low, best, high) in shapes.items():
            profile.add(name, tuple(low), tuple(best), tuple(high))
    cache = str(Path(job.folder) / job.timing_cache) if job.timing_cache else None
    with progress_monitor(trt, progress, job.target, job.weight_bytes()) as monitor:
        create = _create_config(job.target)(profiles=profiles, load_timing_cache=cache, progress_monitor=monitor)
        config = create(builder, definition)
        if hasattr(trt.BuilderFlag, "TF32"):
            config.clear_flag(trt.BuilderFlag.TF32)
        return memoryview(EngineBytesFromNetwork((builder, definition, parser), config, save_timing_cache=cache)())


def _create_config(target: str) -> Any:
    if target == RTX:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        return CreateConfigRTX
    from polygraphy.backend.trt import CreateConfig

    return CreateConfig


def _built_for(trt: ModuleType, target: str) -> tuple[str, ...]:
    """Compute capabilities that an ahead-of-time plan runs on, as this library knows them; () for one GPU's plan."""
    if target != RTX:
        return ()
    names = [re.fullmatch(r"SM(\d+)(\d)", name) for name in getattr(trt.ComputeCapability, "__members__", {})]
    known = sorted((int(name[1]), int(name[2])) for name in names if name)
    return tuple(f"{major}.{minor}" for major, minor in known if (major, minor) >= PORTABLE_FROM)


def _plan_facts(plan: memoryview) -> dict[str, Any]:
    """What the plan's own header says of the GPUs it is for; nothing when it has no such header."""
    head = bytes(plan[: 1 << 22])
    found = re.search(rb"accelerators=\{((?:sm\d+ ?)+)\}", head)
    forward = re.search(rb"hardware_forward_compatibility=([01])", head)
    if not found or not forward:
        return {}
    return {"plan_accelerators": found[1].decode().split(), "plan_forward_compatible": forward[1] == b"1"}
