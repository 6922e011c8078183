"""OpenVINO sessions on the CPU: the compiled blob, torch memory shared with the infer request."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from engines.sessions.base import EngineSession
from engines.sessions.checks import Checked, check_names, profile_of
from sdkd.bundle.onnx_weights import replaced
from sdkd.core.contract import TensorSpec
from sdkd.errors import EngineError
from sdkd.quantization.again import QUANTIZATION, round_again
from sdkd.targets.openvino_shapes import ByShape, compiled_for, corners
from sdkd.targets.openvino_timesteps import FLOAT32, HINTS, keep_timesteps
from sdkd.targets.registry import openvino_core

if TYPE_CHECKING:
    import numpy as np


class OpenVinoSession(EngineSession):
    """Compiled models and an infer request of each.

    `threads`: CPU threads (the library's default when None). The file is a blob, imported as it was compiled, or an IR,
    compiled now: for the shapes of its calls where these are few. The record's flags hold the options.
    """

    def __init__(self, checked: Checked, *, threads: int | None = None) -> None:
        super().__init__(checked)
        import openvino

        self._openvino = openvino
        # The inputs that each request has, with their addresses; requests go with their compiled model.
        self._bound: WeakKeyDictionary[Any, dict[str, tuple[torch.Tensor, int]]] = WeakKeyDictionary()
        self._options = self._compile_options(threads)
        try:
            self._models: ByShape | None = self._load(openvino_core())
            usual = self._models.usual()
        except RuntimeError as error:
            raise EngineError(f"{checked.label} could not be opened by OpenVINO: {error}") from error
        check_names(checked, self._names(usual.inputs), self._names(usual.outputs))

    def _compile_options(self, threads: int | None) -> dict[str, Any]:
        """The options of its build: an imported blob forgets them, and f32 becomes bf16."""
        record = self.checked.record
        config = record.flags.get("config") or {"INFERENCE_PRECISION_HINT": HINTS[record.precision]}
        return dict(config) | ({"INFERENCE_NUM_THREADS": threads} if threads else {})

    def _load(self, core: Any) -> ByShape:
        path, record = self.checked.path, self.checked.record
        if path.suffix == ".blob":
            models = ByShape((), lambda _: core.import_model(path.read_bytes(), "CPU", self._options))
        else:
            models = self._compiled(core, core.read_model(path))
        found = models.usual().get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if found != self._options["INFERENCE_PRECISION_HINT"]:
            raise EngineError(
                f"{self.checked.label} would run in {found} instead of {self._options['INFERENCE_PRECISION_HINT']} "
                f"here. Rebuild it with: {self.checked.bundle.repair(record)} --force"
            )
        return models

    def _compiled(self, core: Any, model: Any) -> ByShape:
        """A model for the shapes that the engine was built for, compiled for the few of its calls or for all."""
        few = corners(profile_of(self.checked))
        return ByShape(few, functools.partial(compiled_for, core, model, self._options))

    def _swap(self, onnx_file: Path, stored: Mapping[str, np.ndarray]) -> None:
        """By compiling the exported graph with the new weights, for the shapes that the engine was built for.

        And without them, where engines were built again meanwhile and the file of this one is gone.
        """
        core = openvino_core()
        try:
            if stored or not self.checked.path.is_file():
                model = self._with_weights(core, onnx_file, stored)
                model.reshape({spec.name: self._partial(spec) for spec in self.contract.inputs})
                if self.checked.record.flags.get("timesteps") == FLOAT32:
                    keep_timesteps(core, model)  # as in the engine's file
                models = self._compiled(core, model)
                models.usual()  # where it fails, the session stays as it was
            else:
                models = self._load(core)
            self._models = models
        except RuntimeError as error:
            raise EngineError(f"{self.checked.label} could not be compiled with other weights: {error}") from error

    def _with_weights(self, core: Any, onnx_file: Path, stored: Mapping[str, np.ndarray]) -> Any:
        """The exported graph with new weights, rounded again where the engine's are."""
        if QUANTIZATION not in self.checked.record.flags:
            model = core.read_model(onnx_file)
            _replace_constants(self._openvino, model, stored, self.checked.label)
            return model
        from sdkd.quantization.graph import save_quantized

        rounded = replaced(onnx_file, stored)
        round_again(self.checked.bundle, self.checked.record, rounded, onnx_file.parent)
        with tempfile.TemporaryDirectory(prefix="sdkd-weights-") as name:
            save_quantized(rounded, onnx_file.parent, file := Path(name) / "model.onnx")
            return core.read_model(file)

    def _partial(self, spec: TensorSpec) -> Any:
        """An input's shape as the engine was built for it: ranges of its dynamic axes."""

        def dimension(axis: str | int) -> Any:
            if isinstance(axis, int):
                return self._openvino.Dimension(axis)
            return self._openvino.Dimension(self.limits[axis].min, self.limits[axis].max)

        return self._openvino.PartialShape([dimension(axis) for axis in spec.axes])

    def _execute(self, feeds: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor], profile: int) -> None:
        assert self._models is not None
        try:
            _, request = self._models.of({name: tensor.shape for name, tensor in feeds.items()})
            self._bind(request, feeds)
            for name, tensor in outputs.items():
                request.set_tensor(name, self._shared(tensor))
            request.infer()
        except RuntimeError as error:
            raise EngineError(f"{self.checked.label} failed in OpenVINO: {error}") from error

    def _bind(self, request: Any, feeds: Mapping[str, torch.Tensor]) -> None:
        """Give a request its inputs, but for those that it has: an image's text is the same tensor in every step."""
        bound = self._bound.setdefault(request, {})
        for name, tensor in feeds.items():
            given, address = bound.get(name, (None, 0))
            if tensor is not given or tensor.data_ptr() != address:
                request.set_tensor(name, self._shared(tensor))
                bound[name] = tensor, tensor.data_ptr()

    def _shared(self, tensor: torch.Tensor) -> Any:
        """The same memory as an OpenVINO tensor; numpy has no bfloat16, so those travel as int16."""
        if tensor.dtype == torch.bfloat16:
            return self._openvino.Tensor(tensor.view(torch.int16).numpy(), tensor.shape, self._openvino.Type.bf16)
        return self._openvino.Tensor(tensor.numpy(), shared_memory=True)

    def _release(self) -> None:
        self._models = None

    def _names(self, ports: Any) -> list[str]:
        """One name of each port: the contract's where a tensor has several."""
        ours = {spec.name for spec in (*self.contract.inputs, *self.contract.outputs)}
        return [next(iter(port.names & ours), port.any_name) for port in ports]


def _replace_constants(openvino: Any, model: Any, stored: Mapping[str, np.ndarray], label: str) -> None:
    """Put other constants where a model has those of the same names; EngineError when it lacks one."""
    constants = {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() == "Constant"}
    if missing := [name for name in stored if name not in constants]:
        raise EngineError(f"{label}: OpenVINO lost the name of {len(missing)} weights (first: {missing[0]})")
    for name, array in stored.items():
        constants[name].output(0).replace(openvino.opset13.constant(array, name=name).output(0))
