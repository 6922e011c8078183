"""ONNX Runtime's execution providers: which of them really run on this machine, and the options that sessions get.

`get_available_providers()` lists what the package was built with. Where the CUDA libraries that it needs do not load,
it gives a session on the CPU without an error: only a session that was opened shows it. The TensorRT-RTX provider is a
plugin: a package of its own beside the CPU's onnxruntime, registered by its library's path.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sdkd.errors import EngineError, InputError
from sdkd.targets.gpu_generations import PLUGIN
from sdkd.targets.nvidia import gpu
from sdkd.targets.registry import TARGETS, cache_folder, overlay, packages_of, removal, require

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

log = logging.getLogger(__name__)

CPU, CUDA, RTX = "cpu", "cuda", "tensorrt-rtx"
ON_GPU = (RTX, CUDA)  # the best first
LIBRARY_NAMES = {CPU: "CPUExecutionProvider", CUDA: "CUDAExecutionProvider", RTX: "NvTensorRTRTXExecutionProvider"}
CUDA_OPTIONS = {
    "use_tf32": "0",  # float32 graphs are compared with float32 results
    # cuDNN is asked what suits a shape. EXHAUSTIVE, the default, takes long over each new shape, and sizes vary here;
    # in 1.20 and later it is only cuDNN's other heuristic, and DEFAULT its slow fallback.
    "cudnn_conv_algo_search": "HEURISTIC",
    "arena_extend_strategy": "kSameAsRequested",  # torch has tensors on the same GPU: nothing is taken in advance
}
PLUGIN_MODULE, PLUGIN_PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx", "onnxruntime-ep-nv-tensorrt-rtx-cu13"
PLUGIN_CACHE = "onnxruntime-rtx"  # in the user's cache: kernels that were compiled for this GPU
INSTALL = {
    CUDA: "pip install 'sdkd[gpu]', of a version for the CUDA that torch has",
    RTX: "pip install 'sdkd[onnxruntime-rtx]'",
}
SAID = 300  # characters of the library's words

Profile = Mapping[str, Sequence[Sequence[int]]]
"""Smallest, best and largest shape by input name."""


def check_provider(name: str) -> str:
    """The provider of a name; InputError lists the choices."""
    if name not in LIBRARY_NAMES:
        raise InputError(f"provider {name!r} is unknown: choose one of {', '.join(LIBRARY_NAMES)}")
    return name


def open_session(
    model: str | bytes, options: SessionOptions, provider: str = CPU, *, device: int = 0, profile: Profile | None = None
) -> InferenceSession:
    """A session of a file or a serialised graph, on a provider and nowhere else; `device`: the index of the GPU.

    `profile`: the shapes that the TensorRT-RTX plugin compiles for. EngineError where another provider was given than
    was asked for; the library's own errors pass.
    """
    ort = require("onnxruntime")
    wanted: list[str | tuple[str, dict[str, str]]] | None = [LIBRARY_NAMES[CPU]]
    if provider == CUDA:
        preload()
        wanted = [(LIBRARY_NAMES[CUDA], {"device_id": str(device), **CUDA_OPTIONS}), LIBRARY_NAMES[CPU]]
    elif provider == RTX:
        _add_plugin(options, device, profile)
        wanted = None  # what the options say
    # Without its fallback, which prints and goes on with the CPU when anything fails on CUDA, memory included.
    session: InferenceSession = ort.InferenceSession(model, options, providers=wanted, enable_fallback=0)
    if (found := session.get_providers()[0]) != LIBRARY_NAMES[provider]:
        raise EngineError(_not_loaded(provider, found))
    return session


def _not_loaded(provider: str, found: str) -> str:
    import torch

    ort = require("onnxruntime")
    asked = f"onnxruntime {ort.__version__} was asked for {LIBRARY_NAMES[provider]} and gave {found}"
    if provider != CUDA:
        return f"{asked}. Install it again: {INSTALL[provider]}"
    made_for = getattr(ort, "cuda_version", "") or "of a version that it does not tell"
    said = f"; {' '.join(preload().split())[:SAID]}" if preload() else ""
    return (
        f"{asked}: libraries of CUDA or cuDNN did not load (it needs CUDA {made_for}, torch has "
        f"{torch.version.cuda or 'none'}{said}). Install them: {INSTALL[CUDA]}"
    )


@functools.cache
def preload() -> str:
    """Load the CUDA and cuDNN libraries of pip's nvidia packages or of torch, once; what the library said of others."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # it prints
        require("onnxruntime").preload_dlls()
    if said.getvalue():
        importlib.import_module("torch")  # which loads its own, wherever they lie
    return said.getvalue()


def _add_plugin(options: SessionOptions, device: int, profile: Profile | None) -> None:
    """Give a session's options the TensorRT-RTX plugin on one GPU, alone: what it cannot run is an error."""
    devices = plugin_devices()
    if device >= len(devices):
        raise EngineError(
            f"the TensorRT-RTX plugin of onnxruntime sees {len(devices)} GPUs, and number {device} was asked for: it "
            f"is made for compute capability {PLUGIN.words}"
        )
    cache = cache_folder() / PLUGIN_CACHE
    cache.mkdir(parents=True, exist_ok=True)
    settings = {"nv_runtime_cache_path": str(cache)}
    sized = {name: shapes for name, shapes in (profile or {}).items() if shapes[0]}  # a number has no shape to give
    for index, end in enumerate(("min", "opt", "max") if sized else ()):
        texts = (f"{name}:{'x'.join(map(str, shapes[index]))}" for name, shapes in sized.items())
        settings[f"nv_profile_{end}_shapes"] = ",".join(texts)
    options.add_provider_for_devices([devices[device]], settings)
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")


def plugin_devices() -> list[Any]:
    """The GPUs that the TensorRT-RTX plugin runs on; EngineError where its library does not load."""
    ort = require("onnxruntime")
    _register_plugin()
    return [one for one in ort.get_ep_devices() if one.ep_name == LIBRARY_NAMES[RTX]]


@functools.cache
def _register_plugin() -> None:
    ort = require("onnxruntime")
    if not hasattr(ort, "register_execution_provider_library"):
        raise EngineError(f"onnxruntime {ort.__version__} takes no plugins: {INSTALL[RTX]}, which brings 1.24 or later")
    try:
        plugin = importlib.import_module(PLUGIN_MODULE)
        ort.register_execution_provider_library(LIBRARY_NAMES[RTX], plugin.get_library_path())
    except Exception as error:
        raise EngineError(f"the TensorRT-RTX plugin of onnxruntime does not load: {error}") from error


# What runs here


def provider_problem(provider: str) -> str | None:
    """Why ONNX Runtime runs nothing on a provider here, and what to do; None where a session on torch's GPU opened."""
    if provider == CPU:
        return None
    if not _is_installed(provider):
        return _not_installed(provider)
    if (device := gpu()) is None:
        return "torch sees no NVIDIA GPU: run on a machine with one, its driver and a torch with CUDA (sdkd doctor)"
    if provider == RTX and not PLUGIN.runs_on(device["compute_capability"]):
        return (
            f"the TensorRT-RTX plugin is made for compute capability {PLUGIN.words}, and this GPU has "
            f"{device['compute_capability']}: {removal((PLUGIN_PACKAGE, 'onnxruntime'))}, then {INSTALL[CUDA]}"
        )
    import torch

    try:
        _try(provider, torch.cuda.current_device())
    except Exception as error:  # noqa: BLE001 - the library's errors share no base
        return str(error)
    return None


def _is_installed(provider: str) -> bool:
    if provider == RTX:
        return importlib.util.find_spec(PLUGIN_MODULE) is not None
    return LIBRARY_NAMES[provider] in require("onnxruntime").get_available_providers()


def _not_installed(provider: str) -> str:
    if provider == RTX:
        return f"the TensorRT-RTX plugin of onnxruntime is not installed: {INSTALL[RTX]}"
    packages = packages_of(TARGETS["onnxruntime"])
    why = f", since {both}" if (both := overlay(packages)) else ""
    return (
        f"the installed onnxruntime {require('onnxruntime').__version__} is built without CUDA"
        f"{why}: {removal(packages)}, then {INSTALL[CUDA]}"
    )


def usual_provider() -> str:
    """The provider of sessions that ask for none: the best on the GPU that is here, else the CPU.

    Where package and GPU are there in vain, that is logged.
    """
    for provider in ON_GPU if gpu() else ():
        if not _is_installed(provider):
            continue
        if (problem := provider_problem(provider)) is None:
            return provider
        _warn(provider, problem)
    return CPU


@functools.cache
def _warn(provider: str, problem: str) -> None:
    log.warning("ONNX Runtime does not use %s, although there is a GPU: %s", LIBRARY_NAMES[provider], problem)


@functools.cache  # of what succeeded: exceptions are not kept, and memory may be there the next time
def _try(provider: str, device: int) -> None:
    options = require("onnxruntime").SessionOptions()
    options.log_severity_level = 3
    open_session(_smallest_graph(), options, provider, device=device)


def _smallest_graph() -> bytes:
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "smallest", [x], [y])
    model: Any = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    serialised: bytes = model.SerializeToString()
    return serialised
