"""ONNX Runtime with CUDA: whether it really runs there on this machine, and the options that its sessions get.

`get_available_providers()` lists what the package was built with. Where the CUDA libraries that it needs do not load,
it gives a session on the CPU without an error: only a session that was opened shows it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
from typing import TYPE_CHECKING, Any

from sdkd.errors import EngineError
from sdkd.targets.registry import gpu

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

log = logging.getLogger(__name__)

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
OPTIONS = {
    "use_tf32": "0",  # float32 graphs are compared with float32 results
    # cuDNN is asked what suits a shape. EXHAUSTIVE, the default, takes long over each new shape, and sizes vary here;
    # in 1.20 and later it is only cuDNN's other heuristic, and DEFAULT its slow fallback.
    "cudnn_conv_algo_search": "HEURISTIC",
    "arena_extend_strategy": "kSameAsRequested",  # torch has tensors on the same GPU: nothing is taken in advance
}
INSTALL = "pip install 'onnxruntime-gpu[cuda,cudnn]', of a version for the CUDA that torch has"
SAID = 300  # characters of the library's words


def providers(cuda: bool, device: int = 0) -> list[str | tuple[str, dict[str, str]]]:
    """What an InferenceSession is given: CUDA on the GPU of this index, then the CPU; or the CPU alone."""
    return [(CUDA, {"device_id": str(device), **OPTIONS}), CPU] if cuda else [CPU]


def open_session(
    model: str | bytes, options: SessionOptions, *, cuda: bool = False, device: int = 0
) -> InferenceSession:
    """A session of a file or a serialised graph, on the CPU or on CUDA and nowhere else.

    EngineError where CUDA was asked for and the library gave a session on the CPU; the library's own errors pass.
    """
    import onnxruntime

    if cuda:
        preload()
    # Without its fallback, which prints and goes on with the CPU when anything fails on CUDA, memory included.
    session = onnxruntime.InferenceSession(model, options, providers=providers(cuda, device), enable_fallback=0)
    if cuda and (found := session.get_providers()[0]) != CUDA:
        raise EngineError(_not_loaded(found))
    return session


def _not_loaded(found: str) -> str:
    import onnxruntime
    import torch

    made_for = getattr(onnxruntime, "cuda_version", "") or "of a version that it does not tell"
    said = f"; {' '.join(preload().split())[:SAID]}" if preload() else ""
    return (
        f"onnxruntime {onnxruntime.__version__} was asked for CUDA and gave {found}: libraries of CUDA or cuDNN did "
        f"not load (it needs CUDA {made_for}, torch has {torch.version.cuda or 'none'}{said}). Install them: {INSTALL}"
    )


@functools.cache
def preload() -> str:
    """Load the CUDA and cuDNN libraries of pip's nvidia packages or of torch, once; what the library said of others."""
    import onnxruntime

    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # it prints
        onnxruntime.preload_dlls()
    if said.getvalue():
        importlib.import_module("torch")  # which loads its own, wherever they lie
    return said.getvalue()


def cuda_problem() -> str | None:
    """Why ONNX Runtime runs nothing on CUDA here, and what to do; None where a session on torch's GPU did open."""
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers():
        return (
            f"the installed onnxruntime {onnxruntime.__version__} is built without CUDA: pip uninstall onnxruntime, "
            f"then {INSTALL}"
        )
    if gpu() is None:
        return "torch sees no NVIDIA GPU: run on a machine with one, its driver and a torch with CUDA (sdkd doctor)"
    import torch

    try:
        _try_cuda(torch.cuda.current_device())
    except Exception as error:  # noqa: BLE001 - the library's errors share no base
        return str(error)
    return None


def runs_on_cuda() -> bool:
    """Whether sessions run on CUDA by default; where package and GPU are there in vain, that is logged."""
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers() or gpu() is None:
        return False
    if problem := cuda_problem():
        _warn(problem)
    return not problem


@functools.cache
def _warn(problem: str) -> None:
    log.warning("ONNX Runtime runs on the CPU, although there is a GPU: %s", problem)


@functools.cache  # of what succeeded: exceptions are not kept, and memory may be there the next time
def _try_cuda(device: int) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    open_session(_smallest_graph(), options, cuda=True, device=device)


def _smallest_graph() -> bytes:
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "smallest", [x], [y])
    model: Any = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    serialised: bytes = model.SerializeToString()
    return serialised
