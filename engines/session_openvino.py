"""OpenVINO sessions on the CPU: the compiled blob, torch memory shared with the infer request."""

from __future__ import annotations

from typing import Any

import torch

from engines.session import Checked, EngineSession, check_names
from sdkd.errors import EngineError
from sdkd.targets import openvino_core

HINTS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}


class OpenVinoSession(EngineSession):
    """One compiled model and one infer request.

    `threads`: CPU threads (the library's default when None). The file is a blob, imported
    as it was compiled, or an IR, compiled now; the record's flags hold the options.
    """

    def __init__(self, checked: Checked, *, threads: int | None = None) -> None:
        super().__init__(checked)
        import openvino

        self._openvino = openvino
        try:
            self._model: Any = self._load(openvino_core(), threads)
            self._request: Any = self._model.create_infer_request()
        except RuntimeError as error:
            raise EngineError(f"{checked.label} could not be opened by OpenVINO: {error}") from error
        check_names(checked, self._names(self._model.inputs), self._names(self._model.outputs))

    def _load(self, core: Any, threads: int | None) -> Any:
        """Open the file with the options of its build: an imported blob forgets them, and f32 becomes bf16."""
        record = self.checked.record
        plain = {"INFERENCE_PRECISION_HINT": HINTS[record.precision]}
        options: dict[str, Any] = dict(record.flags.get("config") or plain)
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        path = self.checked.path
        if path.suffix == ".blob":
            model = core.import_model(path.read_bytes(), "CPU", options)
        else:
            model = core.compile_model(core.read_model(path), "CPU", options)
        found = model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if found != options["INFERENCE_PRECISION_HINT"]:
            raise EngineError(
                f"{self.checked.label} would run in {found} instead of {options['INFERENCE_PRECISION_HINT']} here. "
                f"Rebuild it with: sdkd build-engine {self.checked.bundle.path} --target {self.slot}"
            )
        return model

    def _execute(self, feeds: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]) -> None:
        try:
            for tensors in (feeds, outputs):
                for name, tensor in tensors.items():
                    self._request.set_tensor(name, self._shared(tensor))
            self._request.infer()
        except RuntimeError as error:
            raise EngineError(f"{self.checked.label} failed in OpenVINO: {error}") from error

    def _shared(self, tensor: torch.Tensor) -> Any:
        """The same memory as an OpenVINO tensor; numpy has no bfloat16, so those travel as int16."""
        if tensor.dtype == torch.bfloat16:
            return self._openvino.Tensor(tensor.view(torch.int16).numpy(), tensor.shape, self._openvino.Type.bf16)
        return self._openvino.Tensor(tensor.numpy(), shared_memory=True)

    def _release(self) -> None:
        self._request = self._model = None

    def _names(self, ports: Any) -> list[str]:
        """One name of each port: the contract's where a tensor has several."""
        ours = {spec.name for spec in (*self.contract.inputs, *self.contract.outputs)}
        return [next(iter(port.names & ours), port.any_name) for port in ports]
