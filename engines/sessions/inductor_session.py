"""Inductor sessions: code that PyTorch compiled ahead of time, on torch's tensors and stream, with torch's memory."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

import torch

from engines.sessions.checks import Checked
from engines.sessions.cuda_graphs import Buffers, ShapeGraph, synchronize
from engines.sessions.graphed import Call, GraphedSession
from engines.sessions.ranges import Fit
from sdkd.bundle.onnx_weights import torch_weights, transforms_of
from sdkd.errors import EngineError, ModelError
from sdkd.targets import native_code
from sdkd.targets.inductor import CONSTANTS, Package, laid_out


class InductorSession(GraphedSession):
    """One compiled package; its weights are tensors of this session, read from the exported graph.

    A call's outputs are the tensors that the code gives: nothing is copied. On a GPU, work is queued on torch's current
    stream; `cuda_graphs`: False for none; by default, shapes that come again run through a CUDA graph
    (`engines.sessions.cuda_graphs`), whose inputs and outputs are copied. Other weights are written where the old ones
    are, once all of them are on the device: graphs stay, and calls wait no longer than for a copy within its memory.
    """

    def __init__(self, checked: Checked, cuda_graphs: bool | None = None) -> None:
        super().__init__(checked)
        if checked.record.flags.get("device") == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._swapping = threading.Lock()
        self._changed: set[str] = set()  # weights that are not as exported
        remake = f"build it again: {checked.bundle.repair(checked.record)} --force"
        self._package = self._opened_package(remake)
        self._weights = self._read()
        if missing := sorted(set(self._package.constants) - set(self._weights)):
            raise EngineError(
                f"{checked.label} wants {len(missing)} weights that its bundle lacks (first: {missing[0]}): {remake}"
            )
        self._package.give(self._weights)
        if self.device.type == "cuda":
            self._start_graphs(cuda_graphs)

    # Opening

    def _opened_package(self, remake: str) -> Package:
        """The package, whose code runs when it is opened: only bytes of the digest that was checked, from a copy."""
        record = self.checked.record
        native_code.check(self.checked.label, record.files[0].sha256, remake)
        try:
            with tempfile.TemporaryDirectory(prefix="sdkd-code-") as folder:
                file = native_code.private_copy(self.checked.path, record.files[0].sha256, Path(folder))
                return Package(file, len(self.profiles), self.device)
        except RuntimeError as error:
            reason = (str(error).splitlines() or [repr(error)])[0]
            raise EngineError(f"{self.checked.label} could not be opened by PyTorch ({reason}): {remake}") from error

    def _read(self) -> dict[str, torch.Tensor]:
        """Weights and constants by state-dict name, on the device, as exported."""
        from safetensors.torch import load_file

        with torch.inference_mode(False):  # made in inference mode they could not be written outside of it
            found = torch_weights(self.checked.graph)
            for file in self.checked.record.files:
                if file.path.endswith(CONSTANTS):
                    found |= load_file(self.checked.bundle.path / file.path)
            return {name: laid_out(tensor.to(self.device)) for name, tensor in found.items()}

    # Other weights

    def swap(self, weights: Mapping[str, torch.Tensor]) -> None:
        """As every session."""
        self._check_open()
        with self._giving_weights(), self._swapping:
            ready = self._on_device(weights)
            with self._lock:
                self._check_open()
                self._write(ready)
                self._changed = set(weights)

    def _on_device(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """These weights and, as exported, those that an earlier swap changed; BundleError, ModelError as `swap`."""
        graph = self.checked.graph
        transforms_of(graph, weights)
        for name, value in weights.items():
            if value.shape != (own := self._weights[name].shape):
                raise ModelError(
                    f"weight {name!r} has shape {tuple(value.shape)}, the engine's is {tuple(own)}: give weights of "
                    "the same architecture"
                )
        back = torch_weights(graph, self._changed - set(weights))
        return {
            name: value.detach().to(self.device, self._weights[name].dtype)
            for name, value in {**back, **weights}.items()
        }

    @torch.no_grad()
    def _write(self, ready: Mapping[str, torch.Tensor]) -> None:
        """Write weights where the code and its graphs read them, after the runs that are under way."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).wait_event(self._done)
        for name, value in ready.items():
            self._weights[name].copy_(value)
        if self.device.type == "cuda":
            self._done.record(torch.cuda.current_stream(self.device))  # the next run waits for it

    # Running

    def _outputs(self, feeds: dict[str, torch.Tensor], found: Fit) -> dict[str, torch.Tensor]:
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                if (given := self._through_graph(feeds, found)) is not None:
                    return given
                current = torch.cuda.current_stream(self.device)
                current.wait_event(self._done)  # weights may just have been written on another stream
                given = self._run_code(feeds, found.profile)
                self._done.record(current)
                return given
        return self._run_code(feeds, found.profile)

    def _execute(self, feeds: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor], profile: int) -> None:
        for name, tensor in self._run_code(feeds, profile).items():
            outputs[name].copy_(tensor)

    def _run_code(self, feeds: Mapping[str, torch.Tensor], profile: int) -> dict[str, torch.Tensor]:
        """What the code gives, contiguous, in memory that no input shares."""
        inputs = [feeds[spec.name] for spec in self.contract.inputs]
        try:
            found = self._package.run(profile, inputs)
        except RuntimeError as error:
            raise EngineError(f"{self.checked.label} failed in PyTorch's compiled code: {error}") from error
        taken = {tensor.data_ptr() for tensor in inputs}
        return {
            spec.name: (tensor.clone() if tensor.data_ptr() in taken else tensor).contiguous()
            for spec, tensor in zip(self.contract.outputs, found, strict=True)
        }

    def _through_graph(self, feeds: dict[str, torch.Tensor], found: Fit) -> dict[str, torch.Tensor] | None:
        """The outputs of the shape's CUDA graph; None where the call is to run plainly."""
        if self._graphs.off:
            return None
        shapes = {name: tuple(tensor.shape) for name, tensor in feeds.items()}
        call = Call(feeds, self._empty_outputs(found), found.profile, shapes)
        ran = self._run_graph(call, torch.cuda.current_stream(self.device))
        return dict(call.outputs) if ran else None

    def _make_graph(self, call: Call) -> ShapeGraph:
        """Buffers of one shape, and the code on them."""
        buffers = Buffers(call.feeds, call.outputs)

        def enqueue(_: int) -> None:
            self._execute(buffers.inputs, buffers.outputs, call.profile)  # on the current stream

        return ShapeGraph(buffers, enqueue, None)

    def _release(self) -> None:
        if self.device.type == "cuda":
            synchronize(self.device)
            self._drop_graphs()
            del self._side
        self._weights.clear()
        del self._package
