"""ONNX Runtime sessions: torch memory bound directly, on a CPU or with CUDA."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engines.sessions.base import EngineSession
from engines.sessions.checks import Checked, check_names
from sdkd.bundle.onnx_weights import LARGEST_PROTOBUF, replaced, save_whole
from sdkd.errors import EngineError
from sdkd.quantization.again import round_again
from sdkd.targets.ort_attention import FUSED, fuse_attention
from sdkd.targets.ort_cuda import CPU, CUDA, cuda_problem, open_session, runs_on_cuda

if TYPE_CHECKING:
    import numpy as np

# onnx.TensorProto.DataType of the contract's dtypes: stable numbers of the ONNX format.
ELEMENT = {torch.float32: 1, torch.int32: 6, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}

# Threads that wait for the next call in a loop hold the cores that PyTorch's part of a pipeline needs in between.
REST = "session.force_spinning_stop"


def providers(preferred: str | None = None) -> list[str]:
    """Execution providers to ask for, best first: CUDA where it really runs here, else the CPU.

    `preferred`: `cpu` or `cuda`; EngineError when CUDA is asked for and does not run. Without a preference, a package
    and a GPU that do not come together are logged, and the CPU is what every session and `expected_device` say.
    """
    if preferred == "cuda" and (problem := cuda_problem()):
        raise EngineError(f"ONNX Runtime cannot run on CUDA here: {problem}; or open it with provider='cpu'")
    return [CUDA, CPU] if preferred == "cuda" or (preferred != "cpu" and runs_on_cuda()) else [CPU]


class OnnxRuntimeSession(EngineSession):
    """One ONNX graph in ONNX Runtime.

    `threads`: CPU threads of one operator (the library's default when None). `provider`: `cpu`, `cuda`, or None for the
    best that is there. An engine was optimised for one of them; the other starts from the exported graph. EngineError
    where CUDA was chosen and the session is not there.
    """

    def __init__(self, checked: Checked, *, threads: int | None = None, provider: str | None = None) -> None:
        super().__init__(checked)
        self._providers, self._threads = providers(provider), threads
        if self._providers[0] == CUDA:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._session: Any = self._opened(str(_graph(checked, self._providers[0])))
        check_names(
            checked, (value.name for value in self._session.get_inputs()), (v.name for v in self._session.get_outputs())
        )

    def _opened(self, model: str | bytes, folder: Path | None = None) -> Any:
        """A session of a file, or of a graph in memory whose other weights lie in `folder`."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(REST, "1")
        if self._threads:
            options.intra_op_num_threads = self._threads
        if folder is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        try:
            return open_session(model, options, cuda=self.device.type == "cuda", device=self.device.index or 0)
        except Exception as error:
            raise EngineError(f"{self.checked.label} could not be opened by ONNX Runtime: {error}") from error

    def _swap(self, onnx_file: Path, stored: Mapping[str, np.ndarray]) -> None:
        """By opening the exported graph with the new weights: the saved one has fused and renamed its own.

        And without them, where engines were built again meanwhile and the file of this one is gone.
        """
        own = _graph(self.checked, self._providers[0])
        if not stored and own.is_file():
            self._session = self._opened(str(own))
            return
        model = replaced(onnx_file, stored)
        round_again(self.checked.bundle, self.checked.record, model, onnx_file.parent)
        if self.checked.record.flags.get("attention") == FUSED and self._providers[0] == CPU:
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
    """The engine's file where it was optimised for this provider, else the exported graph."""
    built_for = CUDA if checked.record.flags.get("provider") == "cuda" else CPU
    return checked.path if provider == built_for else checked.graph
