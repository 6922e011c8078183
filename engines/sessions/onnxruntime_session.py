"""ONNX Runtime sessions: torch memory bound directly, on a CPU or with CUDA."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engines.sessions.base import EngineSession
from engines.sessions.checks import Checked, check_names, profile_of
from sdkd.bundle.onnx_weights import LARGEST_PROTOBUF, replaced, save_whole
from sdkd.errors import EngineError
from sdkd.quantization.again import round_again
from sdkd.targets.ort_attention import FUSED, fuse_attention
from sdkd.targets.ort_providers import (
    CPU,
    LIBRARY_NAMES,
    RTX,
    check_provider,
    open_session,
    provider_problem,
    usual_provider,
)
from sdkd.targets.registry import require

if TYPE_CHECKING:
    import numpy as np

# onnx.TensorProto.DataType of the contract's dtypes: stable numbers of the ONNX format.
ELEMENT = {torch.float32: 1, torch.int32: 6, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}

# Threads that wait for the next call in a loop hold the cores that PyTorch's part of a pipeline needs in between.
REST = "session.force_spinning_stop"


def chosen_provider(preferred: str | None = None) -> str:
    """The execution provider of a session: the best that runs here (`usual_provider`), or the one that is asked for.

    InputError for an unknown one, EngineError when it does not run here.
    """
    if preferred is None:
        return usual_provider()
    if problem := provider_problem(check_provider(preferred)):
        raise EngineError(
            f"ONNX Runtime cannot run on {LIBRARY_NAMES[preferred]} here: {problem}; or open it with provider='cpu'"
        )
    return preferred


class OnnxRuntimeSession(EngineSession):
    """One ONNX graph in ONNX Runtime.

    `threads`: CPU threads of one operator (the library's default when None). `provider`: `cpu`, `cuda`,
    `tensorrt-rtx` (a plugin), or None for the best that is there. An engine was made for one of them; the others start
    from the exported graph. EngineError where one on a GPU was chosen and the session is not there.
    """

    def __init__(self, checked: Checked, *, threads: int | None = None, provider: str | None = None) -> None:
        super().__init__(checked)
        self._provider, self._threads = chosen_provider(provider), threads
        if self._provider != CPU:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._session: Any = self._opened(str(_graph(checked, self._provider)))
        check_names(
            checked, (value.name for value in self._session.get_inputs()), (v.name for v in self._session.get_outputs())
        )

    def _opened(self, model: str | bytes, folder: Path | None = None) -> Any:
        """A session of a file, or of a graph in memory whose other weights lie in `folder`."""
        options = require("onnxruntime").SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(REST, "1")
        if self._threads:
            options.intra_op_num_threads = self._threads
        if folder is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        try:
            profile = profile_of(self.checked) if self._provider == RTX else None
            return open_session(model, options, self._provider, device=self.device.index or 0, profile=profile)
        except Exception as error:
            raise EngineError(f"{self.checked.label} could not be opened by ONNX Runtime: {error}") from error

    def _swap(self, onnx_file: Path, stored: Mapping[str, np.ndarray]) -> None:
        """By opening the exported graph with the new weights: the saved one has fused and renamed its own.

        And without them, where engines were built again meanwhile and the file of this one is gone.
        """
        own = _graph(self.checked, self._provider)
        if not stored and own.is_file():
            self._session = self._opened(str(own))
            return
        model = replaced(onnx_file, stored)
        round_again(self.checked.bundle, self.checked.record, model, onnx_file.parent)
        if self.checked.record.flags.get("attention") == FUSED and self._provider == CPU:
            fuse_attention(model)  # as in the engine's file
        if model.ByteSize() < LARGEST_PROTOBUF:
            self._session = self._opened(model.SerializeToString(), onnx_file.parent)
            return
        with tempfile.TemporaryDirectory(prefix="sdkd-weights-") as name:
            file = Path(name) / "model.onnx"
            save_whole(model, onnx_file.parent, file)
            self._session = self._opened(str(file))

    def _execute(self, feeds: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor], profile: int) -> None:
        binding = self._session.io_binding()
        for tensors, bind in ((feeds, binding.bind_input), (outputs, binding.bind_output)):
            for name, tensor in tensors.items():
                place = (self.device.type, self.device.index or 0)
                bind(name, *place, ELEMENT[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        if self.device.type == "cuda":  # the library runs on its own stream
            torch.cuda.current_stream(self.device).synchronize()
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise EngineError(f"{self.checked.label} failed in ONNX Runtime: {error}") from error
        if self.device.type == "cuda":
            binding.synchronize_outputs()

    def _release(self) -> None:
        self._session = None


def _graph(checked: Checked, provider: str) -> Path:
    """The engine's file where it was made for this provider, else the exported graph."""
    return checked.path if provider == checked.record.flags.get("provider", CPU) else checked.graph
