"""TensorRT and TensorRT-RTX sessions: torch pointers bound directly, on torch's stream, with torch's memory.

One code path for TensorRT 10, 11 and TensorRT-RTX: features are found with hasattr, never by version. Every value that
the library returns is checked, and the tensor named. Polygraphy's TrtRunner is no substitute: its inputs and outputs
are on a stream of its own, each call waits for the device, and it has neither CUDA graphs nor refit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engines.sessions.checks import Checked, check_names
from engines.sessions.cuda_graphs import Buffers, ShapeGraph, graph_key, synchronize
from engines.sessions.graphed import Call, GraphedSession
from engines.sessions.trt.context import BoundContext, failure
from engines.sessions.trt.opening import (
    HalfRefitError,
    RuntimeCache,
    captures_by_itself,
    deserialize,
    open_context,
    refit,
)
from sdkd.bundle.onnx_weights import exported_weights
from sdkd.errors import EngineError
from sdkd.targets.registry import require
from sdkd.targets.tensorrt_api import ICudaEngine, TensorRT, recorder

if TYPE_CHECKING:
    import numpy as np

DATA_TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32"}
ALIGNMENT = 256  # bytes, of every address given to TensorRT


class TensorRTSession(GraphedSession):
    """One engine and one execution context on torch's current CUDA device.

    Work is queued on torch's current stream, or on a side stream tied to it by events when that is the default
    stream, where TensorRT would synchronize the device. Activation memory comes from torch's allocator for the time of
    one call, sized for the call's shapes, so that all engines of a process share it.

    `cuda_graphs`: False for none; by default, shapes that come again run through a CUDA graph
    (`engines.sessions.cuda_graphs`), and keep their buffers and activation memory. Where that fails, calls run as
    without, and the log says why.
    """

    def __init__(self, checked: Checked, cuda_graphs: bool | None = None) -> None:
        super().__init__(checked)
        self._trt: TensorRT = require(checked.record.target)
        self._log = recorder(checked.record.target)
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._native = captures_by_itself(self._trt)
        self._swapped: Mapping[str, np.ndarray] = {}  # by a refit
        self._workspace: torch.Tensor | None = None  # activation memory that the graphs share
        with torch.cuda.device(self.device):
            self._open_engine(checked)
            self._start_graphs(cuda_graphs)

    # Opening

    def _open_engine(self, checked: Checked) -> None:
        """Deserialize, and make the context of plain runs; what was open stays when that fails."""
        engine = deserialize(self._trt, self._log, checked, self._rebuild)
        self._check_io(engine)
        if engine.num_optimization_profiles != len(self.profiles):
            raise EngineError(
                f"{self.checked.label} has {engine.num_optimization_profiles} optimization profiles, its manifest says "
                f"{' and '.join(map(str, self.checked.record.profiles))}. Rebuild it with: {self._rebuild}"
            )
        kernels = RuntimeCache(checked.record.files[0].sha256)
        main = self._context(engine, kernels)
        self._main, self._engine, self._kernels = main, engine, kernels

    # Other weights

    def _swap(self, onnx_file: Path, stored: Mapping[str, np.ndarray]) -> None:
        """By refit, the weights of an earlier swap brought back; by rebuilding where the engine cannot be refitted."""
        synchronize(self.device)
        with torch.cuda.device(self.device):
            self._drop_graphs()  # they hold the old weights, and their contexts the old engine
            if self.checked.record.flags.get("options", {}).get("refit", "none") == "none":
                self._open_engine(self.rebuilt(stored))
                return
            try:
                self._refit(onnx_file, stored)
            except HalfRefitError:  # the weights from before come back
                self._open_engine(self.checked)
                if before := self._swapped:
                    self._swapped = {}
                    self._refit(onnx_file, before)
                raise

    def _refit(self, onnx_file: Path, stored: Mapping[str, np.ndarray]) -> None:
        back = exported_weights(onnx_file, set(self._swapped) - set(stored))
        fill = partial(exported_weights, onnx_file)
        refit(self._trt, self._engine, self._log, {**back, **stored}, self.checked.label, fill)
        self._swapped = stored

    @property
    def _rebuild(self) -> str:
        return f"{self.checked.bundle.repair(self.checked.record)} --force"  # its record says that it is fresh

    @property
    def _failed(self) -> Callable[[str], EngineError]:
        """Makes the error for a step that failed; holds no session, so that none is part of a cycle."""
        return partial(failure, self.checked.label, self._trt.__name__, self._log.messages)

    def _context(self, engine: ICudaEngine, kernels: RuntimeCache, graphs: bool = False) -> BoundContext:
        """An execution context of an engine; `graphs`: for one shape, that captures by itself if it can."""
        return open_context(self._trt, engine, kernels, self._failed, graphs=graphs)

    def _check_io(self, engine: ICudaEngine) -> None:
        """Names, directions, places and dtypes as in the contract: a silent float32 engine is refused here."""
        trt = self._trt
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        check_names(self.checked, inputs, set(names) - set(inputs))
        for spec in (*self.contract.inputs, *self.contract.outputs):
            if engine.get_tensor_dtype(spec.name) != getattr(trt.DataType, DATA_TYPES[spec.dtype]):
                raise EngineError(
                    f"{self.checked.label} has tensor {spec.name!r} as {engine.get_tensor_dtype(spec.name)}, the "
                    f"contract says {spec.dtype}. Rebuild it with: {self._rebuild}"
                )
            if engine.get_tensor_location(spec.name) != trt.TensorLocation.DEVICE:
                raise EngineError(f"{self.checked.label} wants tensor {spec.name!r} in host memory. Rebuild it")

    def layer_information(self) -> str:
        """What the engine says of its layers, as JSON; EngineError when it says nothing."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._main.context  # shapes of the active profile
        text = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        if not text:
            raise self._failed("inspecting the layers")
        return text

    # Running

    def _execute(self, feeds: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor], profile: int) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in feeds.items()}
        call = Call(feeds, outputs, profile, shapes)
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream(self.device)
            if not self._run_graph(call, current):
                self._run_plainly(call, current)

    def _run_plainly(self, call: Call, current: torch.cuda.Stream) -> None:
        stream = self._side if current.cuda_stream == 0 else current
        stream.wait_event(self._done)  # a context runs, and changes its profile, once at a time, on any stream
        self._main.prepare(call, stream)
        # A slice of a batch, or one of many timesteps, may start anywhere: those are copied.
        aligned = {name: t if t.data_ptr() % ALIGNMENT == 0 else t.clone() for name, t in call.feeds.items()}
        self._main.bind({**aligned, **call.outputs})
        # The block is the same one in a steady loop.
        workspace = self._allocate(self._main.needed)
        self._main.set_workspace(workspace)
        stream.wait_stream(current)  # inputs, and copies of them, are made on the current stream
        try:
            self._main.enqueue(stream.cuda_stream)
        finally:
            self._done.record(stream)
            current.wait_stream(stream)  # what is freed below is used again only after the engine is done
            del aligned, workspace
        self._kernels.save_for(graph_key(call.profile, call.shapes))

    def _allocate(self, size: int) -> torch.Tensor | None:
        """Activation memory from torch's allocator."""
        return torch.empty(size, dtype=torch.uint8, device=self.device) if size else None

    # Running through graphs

    def _start_graph(self, call: Call, current: torch.cuda.Stream) -> bool:
        try:
            return super()._start_graph(call, current)
        finally:
            self._kernels.save()

    def _make_graph(self, call: Call) -> ShapeGraph:
        """A context, buffers and activation memory for one shape, bound to one another once and for all."""
        bound = self._context(self._engine, self._kernels, graphs=True)
        bound.prepare(call, self._side)
        if self._workspace is None or self._workspace.numel() < bound.needed:  # graphs keep the one that they have
            self._check_memory(bound.needed)
            self._workspace = self._allocate(bound.needed)
        buffers = Buffers(call.feeds, call.outputs)
        bound.bind({**buffers.inputs, **buffers.outputs})
        bound.set_workspace(self._workspace)
        return ShapeGraph(buffers, bound.enqueue, self._workspace, self._native)

    def _check_memory(self, needed: int) -> None:
        """EngineError when lasting activation memory would take more than half of what the device has free."""
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        free = torch.cuda.mem_get_info(self.device)[0] + kept
        if needed > free // 2:
            raise EngineError(f"{needed >> 20} MiB of activation memory would be kept, and {free >> 20} MiB are free")

    def _drop_graphs(self) -> None:
        super()._drop_graphs()
        self._workspace = None

    def _release(self) -> None:
        synchronize(self.device)
        self._drop_graphs()
        self._kernels.save()
        del self._main, self._engine, self._kernels, self._side
