"""Target onnxruntime: the graph optimised once and saved, so that a session opens without doing it again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.build.job import Built, Job, Run, check_io
from sdkd.bundle.onnx_weights import save_whole
from sdkd.core.console import Progress
from sdkd.core.contract import QUANTIZED
from sdkd.errors import BuildError, EngineError, InputError
from sdkd.targets.ort_attention import FUSED, fuse_attention
from sdkd.targets.ort_providers import CPU, CUDA, LIBRARY_NAMES, RTX, Profile, open_session, usual_provider
from sdkd.targets.registry import require

if TYPE_CHECKING:
    import numpy as np
    from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions

PURPOSE = "the comparison of an engine with its graph"
SMALL_BYTES = "1024"  # weights below this stay in the graph
LEVELS = {CPU: "extended", CUDA: "extended", RTX: "none"}
COPIES = ("MemcpyFromHost", "MemcpyToHost")
DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}


def half_precision() -> str:
    """The fastest float precision of its engines: of a CPU fp32, since half is computed in float32 there."""
    return "fp32" if usual_provider() == CPU else "fp16"


def flags(engine_precision: str, onnx_precision: str) -> dict[str, Any]:
    """Options of the build. Level `extended` leaves out layouts that only this machine's CPU knows.

    The saved graph belongs to its provider: for the CPU, half-precision nodes are wrapped in casts to float, and a
    float32 graph's attention becomes the library's own; for the TensorRT-RTX plugin, which optimises by itself, it is
    the exported one. InputError for int8 where it runs on a GPU, which has no kernels for it.
    """
    provider = usual_provider()
    if engine_precision in QUANTIZED and provider != CPU:
        raise InputError(
            f"ONNX Runtime runs on {LIBRARY_NAMES[provider]} here, which has no kernels for its {engine_precision} "
            "graphs: build it for tensorrt"
        )
    own = provider == CPU and onnx_precision == "fp32"
    return {"optimization": LEVELS[provider], "provider": provider} | ({"attention": FUSED} if own else {})


def build(job: Job, progress: Progress) -> Built:
    """Save the optimised graph as <component>.onnx and its weights beside it as <component>.onnx.data.

    The weights always get a file of their own: otherwise onnxruntime leaves the large ones in the bundle's
    model.onnx.data and writes a path to it that does not hold, and a single file ends at 2 GB. BuildError where the
    flags say CUDA and the library does not run there: a graph made for the CPU must not pass for one.
    """
    levels, provider = require("onnxruntime").GraphOptimizationLevel, job.flags["provider"]
    session = _session(job.onnx, levels.ORT_DISABLE_ALL)
    check_io(job, _tensors(session.get_inputs()), _tensors(session.get_outputs()))
    del session
    file = job.file(".onnx")
    progress("optimising the graph", 0.1)
    weights = _save(job, file, provider)
    progress("opening the saved graph", 0.8)
    saved = _session(str(file), levels.ORT_ENABLE_ALL, provider, profile=job.profiles[0])
    external = weights.is_file()  # not when every weight is small
    names = (file.name, weights.name) if external else (file.name,)
    return Built(names, {"external_data": external}, run=_runner(saved))


def _save(job: Job, file: Path, provider: str) -> Path:
    """Write the graph for a provider; where its weights then are."""
    import onnx

    weights, ort = file.with_suffix(".onnx.data"), require("onnxruntime")
    if provider == RTX:
        save_whole(onnx.load(job.onnx, load_external_data=False), Path(job.onnx).parent, file)
        return weights
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(file)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", weights.name)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", SMALL_BYTES)
    _session(_graph(job, options), ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED, provider, options)
    if provider == CUDA:
        _without_copies(file)
    return weights


def _graph(job: Job, options: SessionOptions) -> str | bytes:
    """The exported graph's path, or the graph itself with other attention nodes; weights beside it are found still."""
    if job.flags.get("attention") != FUSED:
        return job.onnx
    import onnx

    model = onnx.load(job.onnx, load_external_data=False)
    if not fuse_attention(model):
        return job.onnx
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(Path(job.onnx).parent))
    return model.SerializeToString()


def _without_copies(file: Path) -> None:
    """Take the copies between CPU and GPU out of a saved graph, whose outputs keep their names.

    Opening it adds them again, by the same names.
    """
    import onnx

    model = onnx.load(file, load_external_data=False)
    graph = model.graph
    pairs = [(node.input[0], node.output[0]) for node in graph.node if node.op_type in COPIES]
    kept = [node for node in graph.node if node.op_type not in COPIES]
    outputs = {value.name for value in graph.output}
    same: dict[str, str] = {}
    for source, copied in pairs:
        source = same.get(source, source)
        old, new = (source, copied) if copied in outputs else (copied, source)
        same = {name: new if other == old else other for name, other in same.items()} | {old: new}
    for node in kept:
        for names in (node.input, node.output):
            names[:] = [same.get(name, name) for name in names]
    if pairs:
        del graph.node[:]
        graph.node.extend(kept)
        onnx.save(model, file)


def open_reference(path: str) -> Run:
    """Run an ONNX graph as it is, without optimisation: what engines are compared with."""
    return _runner(_session(path, require("onnxruntime", PURPOSE).GraphOptimizationLevel.ORT_DISABLE_ALL))


def _session(
    path: str | bytes,
    level: GraphOptimizationLevel,
    provider: str = CPU,
    options: SessionOptions | None = None,
    profile: Profile | None = None,
) -> InferenceSession:
    options = options or require("onnxruntime").SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3
    try:
        return open_session(path, options, provider, profile=profile)
    except EngineError as error:
        raise BuildError(str(error)) from error


def _tensors(rows: list[Any]) -> dict[str, str]:
    return {row.name: DTYPES.get(row.type, row.type) for row in rows}


def _runner(session: InferenceSession) -> Run:
    def run(feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return list(session.run(None, dict(feeds)))

    return run
