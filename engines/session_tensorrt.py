"""TensorRT and TensorRT-RTX sessions: torch pointers bound directly, on torch's stream, with torch's memory.

One code path for TensorRT 10, 11 and TensorRT-RTX: features are found with hasattr, never by version. Every value that
the library returns is checked, and the tensor named.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping
from functools import cache as once
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from engines.refit_tensorrt import refit
from engines.session import Checked, EngineSession, check_engine, check_names, verify_once
from sdkd.errors import EngineError
from sdkd.files import write_bytes
from sdkd.onnx_weights import exported_weights
from sdkd.targets import cache_folder, require

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

DATA_TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32"}
ALIGNMENT = 256  # bytes, of every address given to TensorRT


@once
def recorder(target: str) -> Any:
    """The logger of a target's library, which keeps one for the whole process: its last errors."""
    trt = require(target)

    class Recorder(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: deque[str] = deque(maxlen=8)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.messages.append(message)
            log.debug("%s: %s", severity, message)

    return Recorder()


class TensorRTSession(EngineSession):
    """One engine and one execution context on torch's current CUDA device.

    Work is queued on torch's current stream, or on a side stream tied to it by events when that is the default
    stream, where TensorRT would synchronize the device. Activation memory comes from torch's allocator for the time of
    one call, sized for the call's shapes, so that all engines of a process share it.
    """

    def __init__(self, checked: Checked) -> None:
        super().__init__(checked)
        self._trt: ModuleType = require(checked.record.target)
        self._log = recorder(checked.record.target)
        self._log.messages.clear()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._side = torch.cuda.Stream(self.device)
        self._done = torch.cuda.Event()
        self.opened = checked  # what a swap of weights comes back to
        self._swapped: set[str] = set()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._workspace = (0, 0)  # address and bytes that the context was last given
        self._needed = 0
        self._cache: Any = None
        self._cached_bytes = 0
        with torch.cuda.device(self.device):
            self._engine: Any = self._deserialize()
            self._context: Any = self._create_context()
        self._check_io()

    # Opening

    def _deserialize(self) -> Any:
        trt = self._trt
        plan = self.checked.path.read_bytes()
        runtime = trt.Runtime(self._log)
        if hasattr(runtime, "get_engine_validity"):
            validity, diagnostics = runtime.get_engine_validity(plan)
            if validity == trt.EngineValidity.INVALID:
                raise EngineError(
                    f"{self.checked.label} cannot run here: {trt.__name__} {trt.__version__} says "
                    f"{', '.join(reasons(trt, diagnostics))}. Rebuild it with: {self._rebuild}"
                )
        if self._options.get("version_compatible"):  # such a plan brings the runtime that it was built for
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(f"{self.checked.label} was refused{self._said()}. Rebuild it with: {self._rebuild}")
        if self._options.get("strip_weights"):
            self._fill_weights(engine)
        if self._options.get("weight_streaming"):  # to be set before there is a context
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        return engine

    @property
    def _options(self) -> Mapping[str, Any]:
        """What the engine was built with, where that is not as by default."""
        return dict(self.checked.record.flags.get("options", {}))

    def _fill_weights(self, engine: Any) -> None:
        """Give a plan without weights those of the ONNX that it was built from, which is checked first."""
        trt, bundle = self._trt, self.checked.bundle
        component = bundle.component(self.checked.record.component)
        verify_once(bundle, component)
        refitter = trt.Refitter(engine, self._log)
        parser_refitter = trt.OnnxParserRefitter(refitter, self._log)
        if not parser_refitter.refit_from_file(str(bundle.path / component.files[0].path)):
            raise self._failed(f"reading the weights of {component.files[0].path}")
        if missing := refitter.get_missing_weights():
            raise self._failed(f"filling in {len(missing)} weights, first {missing[0]!r},")
        if not refitter.refit_cuda_engine():
            raise self._failed("filling in the weights")

    # Other weights

    def _swap(self, onnx_file: Path, stored: Mapping[str, np.ndarray]) -> None:
        """By refit, the weights of an earlier swap brought back; by rebuilding where the engine cannot be refitted."""
        torch.cuda.synchronize(self.device)
        with torch.cuda.device(self.device):
            if self._options.get("refit", "none") == "none":
                self._reopen(stored)
                return
            back = exported_weights(onnx_file, self._swapped - set(stored))
            refit(self._trt, self._engine, self._log, {**back, **stored}, self.checked.label)
        self._swapped = set(stored)

    def _reopen(self, stored: Mapping[str, np.ndarray]) -> None:
        """Open an engine that was built from these weights; the one that was checked first when there are none."""
        before = self.checked
        if stored and self.rebuild is None:
            raise EngineError(
                f"{before.label} was built for its own weights: build it with --refit lora (or all, for whole "
                f"checkpoints), or give rebuild=sdkd.workflow.rebuild to plug or load_pipeline"
            )
        if stored and self.rebuild is not None:
            again = self.rebuild(self.opened.bundle, self.opened.record, stored)
            self.checked = check_engine(again, self.slot, self.opened.record.component)
        else:
            self.checked = self.opened
        try:
            self._engine, self._shapes, self._workspace = self._deserialize(), {}, (0, 0)
            self._context = self._create_context()
        except BaseException:
            self.checked = before
            raise

    @property
    def _rebuild(self) -> str:
        return f"sdkd build-engine {self.checked.bundle.path} --target {self.slot}"

    def _said(self) -> str:
        return f" by {self._trt.__name__} ({'; '.join(self._log.messages)})" if self._log.messages else ""

    def _failed(self, what: str) -> EngineError:
        return EngineError(f"{self.checked.label}: {what} failed{self._said()}")

    def _create_context(self) -> Any:
        trt, engine = self._trt, self._engine
        strategies = trt.ExecutionContextAllocationStrategy
        probe = trt.IExecutionContext
        self._managed = hasattr(probe, "update_device_memory_size_for_shapes") and hasattr(probe, "set_device_memory")
        strategy = strategies.USER_MANAGED if self._managed else strategies.STATIC
        if hasattr(engine, "create_runtime_config"):
            runtime_config = engine.create_runtime_config()
            runtime_config.set_execution_context_allocation_strategy(strategy)
            self._load_cache(runtime_config)
            context = engine.create_execution_context(runtime_config)
        else:
            context = engine.create_execution_context(strategy)
        if context is None:
            raise self._failed("creating an execution context")
        return context

    def _check_io(self) -> None:
        """Names, directions, places and dtypes as in the contract: a silent float32 engine is refused here."""
        trt, engine = self._trt, self._engine
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
        inspector.execution_context = self._context  # shapes of the active profile
        text = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        if not text:
            raise self._failed("inspecting the layers")
        return str(text)

    # Running

    def _execute(self, feeds: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]) -> None:
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream(self.device)
            stream = self._side if current.cuda_stream == 0 else current
            stream.wait_event(self._done)  # a context runs, and changes its profile, once at a time, on any stream
            changed = self._set_shapes(feeds, stream)
            self._check_shapes(outputs)
            held = self._bind(feeds, outputs)
            workspace = self._lend_workspace()
            stream.wait_stream(current)  # inputs, and copies of them, are made on the current stream
            queued = self._context.execute_async_v3(stream.cuda_stream)
            self._done.record(stream)
            current.wait_stream(stream)  # what is freed below is used again only after the engine is done
            del held, workspace
            if not queued:
                raise self._failed("queueing the engine")
        if changed:  # the first call of a shape compiles
            self._save_cache()

    def _set_shapes(self, feeds: Mapping[str, torch.Tensor], stream: torch.cuda.Stream) -> bool:
        """Profile and input shapes, when they differ from the last call's; whether they did."""
        shapes = {name: tuple(tensor.shape) for name, tensor in feeds.items()}
        if shapes == self._shapes:
            return False
        self._shapes = {}
        context = self._context
        self._select_profile(shapes, stream)
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise self._failed(f"setting shape {shape} of input {name!r}")
        if missing := context.infer_shapes():
            raise self._failed(f"inferring shapes of {', '.join(missing)}")
        self._needed = context.update_device_memory_size_for_shapes() if self._managed else 0
        self._shapes = shapes
        return True

    def _select_profile(self, shapes: Mapping[str, tuple[int, ...]], stream: torch.cuda.Stream) -> None:
        """Make the smallest profile that fits the active one; its shapes and memory must then be set anew."""
        profile = self._find_profile(shapes)
        if profile == self._context.active_optimization_profile:
            return
        if not self._context.set_optimization_profile_async(profile, stream.cuda_stream):
            raise self._failed(f"selecting optimization profile {profile}")
        self._workspace = (0, 0)

    def _find_profile(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The optimization profile that holds all shapes and has the smallest largest ones, by the engine itself."""
        fitting: list[tuple[int, int]] = []
        for index in range(self._engine.num_optimization_profiles):
            spans = {name: self._engine.get_tensor_profile_shape(name, index) for name in shapes}
            if all(_inside(shapes[name], span[0], span[-1]) for name, span in spans.items()):
                fitting.append((sum(math.prod(span[-1]) for span in spans.values()), index))
        if not fitting:
            raise EngineError(
                f"{self.checked.label} has no optimization profile for {dict(shapes)}, though its manifest says "
                f"{' and '.join(map(str, self.checked.record.profiles))}. Rebuild it with: {self._rebuild}"
            )
        return min(fitting)[1]

    def _check_shapes(self, outputs: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in outputs.items():
            found = tuple(self._context.get_tensor_shape(name))
            if found != tuple(tensor.shape):
                raise EngineError(
                    f"{self.checked.label} gives {name!r} shape {found}, the contract {tuple(tensor.shape)}"
                )

    def _bind(self, feeds: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Give the context every address; returns what must live until the work is queued."""
        # A slice of a batch, or one of many timesteps, may start anywhere: those are copied.
        aligned = {name: t if t.data_ptr() % ALIGNMENT == 0 else t.clone() for name, t in feeds.items()}
        for name, tensor in {**aligned, **outputs}.items():
            if not self._context.set_tensor_address(name, tensor.data_ptr()):
                raise self._failed(f"binding tensor {name!r}")
        return list(aligned.values())

    def _lend_workspace(self) -> torch.Tensor | None:
        """Activation memory for this call from torch's allocator; the block is the same one in a steady loop."""
        if not self._needed:
            return None
        block = torch.empty(self._needed, dtype=torch.uint8, device=self.device)
        if (block.data_ptr(), self._needed) != self._workspace:
            self._context.set_device_memory(block.data_ptr(), self._needed)
            self._workspace = (block.data_ptr(), self._needed)
        return block

    # What TensorRT-RTX compiled for this GPU, kept by the plan's SHA-256 among the user's caches, never in the bundle:
    # it is native code, too, and no manifest vouches for it

    @property
    def _cache_path(self) -> Path:
        return cache_folder() / "runtime" / f"{self.checked.record.files[0].sha256}.cache"

    def _load_cache(self, runtime_config: Any) -> None:
        if not hasattr(runtime_config, "create_runtime_cache"):
            return
        cache = runtime_config.create_runtime_cache()
        if self._cache_path.is_file():
            blob = self._cache_path.read_bytes()
            if cache.deserialize(blob):
                self._cached_bytes = len(blob)
            else:
                log.info("%s is for another GPU, driver or version: kernels are compiled again", self._cache_path)
        if not runtime_config.set_runtime_cache(cache):
            raise self._failed("setting the runtime cache")
        self._cache = cache

    def _save_cache(self) -> None:
        """Write the runtime cache when it grew; a read-only home only costs the next start some seconds."""
        if self._cache is None:
            return
        memory = self._cache.serialize()
        blob = b"" if memory is None else bytes(memory)
        if len(blob) <= self._cached_bytes:
            return
        try:
            write_bytes(self._cache_path, blob)
        except OSError as error:
            log.info("the runtime cache could not be kept at %s: %s", self._cache_path, error)
        self._cached_bytes = len(blob)

    def _release(self) -> None:
        torch.cuda.synchronize(self.device)
        self._save_cache()
        self._context = self._engine = self._cache = None


def _inside(shape: tuple[int, ...], low: Any, high: Any) -> bool:
    return all(a <= size <= b for size, a, b in zip(shape, tuple(low), tuple(high), strict=False))


def reasons(trt: ModuleType, diagnostics: Any) -> list[str]:
    """Names of the bits that TensorRT-RTX sets when it finds an engine invalid."""
    members = trt.EngineInvalidityDiagnostics.__members__
    bits = int(getattr(diagnostics, "value", diagnostics))
    found = [name.lower().replace("_", " ") for name, member in members.items() if bits & int(member.value)]
    return found or ["invalid"]
