"""What is used of TensorRT and TensorRT-RTX, as types, under the libraries' own names; neither library is imported.

Members that some generations lack are looked for with `hasattr` first: tests/export/build/tensorrt_api.json lists what
each generation has, and a test holds this file and the code against it.
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, SupportsInt

from sdkd.targets.registry import require

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger(__name__)


class Member(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...
    def __int__(self) -> int: ...
    def __le__(self, other: Member, /) -> bool: ...


class Enumeration(Protocol):
    __members__: Mapping[str, Member]

    def __getattr__(self, name: str, /) -> Member: ...


class ILogger(Protocol):
    def log(self, severity: Member, message: str) -> None: ...


class ITensor(Protocol):
    name: str
    dtype: Member


class ILayer(Protocol):
    type: Member

    def get_output(self, index: int) -> ITensor: ...


class IAttention(Protocol):
    decomposable: bool


class IAttentionInputLayer(ILayer, Protocol):
    attention: IAttention


class INetworkDefinition(Protocol):
    num_inputs: int
    num_outputs: int
    num_layers: int

    def get_input(self, index: int) -> ITensor: ...
    def get_output(self, index: int) -> ITensor: ...
    def get_layer(self, index: int) -> ILayer: ...
    def add_input(self, name: str, dtype: Member, shape: Sequence[int]) -> ITensor: ...
    def add_convolution_nd(self, tensor: ITensor, maps: int, kernel_shape: Sequence[int], kernel: object) -> ILayer: ...
    def mark_output(self, tensor: ITensor) -> None: ...
    def mark_weights_refittable(self, name: str) -> bool: ...


class IBuilderConfig(Protocol):
    """Settings of a build. What the setters that return nothing do not take, they only log."""

    num_compute_capabilities: int

    def set_flag(self, flag: Member) -> None: ...
    def get_flag(self, flag: Member) -> bool: ...
    def set_preview_feature(self, feature: Member, enable: bool) -> None: ...
    def get_preview_feature(self, feature: Member) -> bool: ...
    def set_compute_capability(self, compute_capability: Member, index: int) -> bool: ...


class Builder(Protocol):
    """Makes networks, settings and plans; a plan that is None failed."""

    def create_network(self, flags: int) -> INetworkDefinition: ...
    def create_builder_config(self) -> IBuilderConfig: ...
    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> Buffer | None: ...


class IRuntimeCache(Protocol):
    def serialize(self) -> Buffer | None: ...
    def deserialize(self, blob: bytes) -> bool: ...


class IRuntimeConfig(Protocol):
    cuda_graph_strategy: Any  # a member, whose class has the others
    dynamic_shapes_kernel_specialization_strategy: Any  # likewise

    def set_execution_context_allocation_strategy(self, strategy: Member) -> None: ...
    def create_runtime_cache(self) -> IRuntimeCache: ...
    def set_runtime_cache(self, cache: IRuntimeCache) -> bool: ...


class EngineInspector(Protocol):
    execution_context: IExecutionContext

    def get_engine_information(self, kind: Member) -> str: ...


class ICudaEngine(Protocol):
    """An engine; sizes and budgets are bytes."""

    num_io_tensors: int
    num_optimization_profiles: int

    def get_tensor_name(self, index: int) -> str: ...
    def get_tensor_mode(self, name: str) -> Member: ...
    def get_tensor_dtype(self, name: str) -> Member: ...
    def get_tensor_location(self, name: str) -> Member: ...
    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int: ...
    def create_runtime_config(self) -> IRuntimeConfig: ...
    def create_execution_context(self, how: IRuntimeConfig | Member = ..., /) -> IExecutionContext | None: ...
    def create_engine_inspector(self) -> EngineInspector: ...


class IExecutionContext(Protocol):
    """Profile, shapes, addresses and memory of one run at a time; addresses, sizes and streams are plain numbers."""

    engine: ICudaEngine
    active_optimization_profile: int
    nvtx_verbosity: Any  # a member, whose class has the others

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool: ...
    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool: ...
    def infer_shapes(self) -> list[str]: ...
    def get_tensor_shape(self, name: str) -> Iterable[int]: ...
    def set_tensor_address(self, name: str, memory: int) -> bool: ...
    def update_device_memory_size_for_shapes(self) -> int: ...
    def set_device_memory(self, memory: int, size: int) -> None: ...
    def execute_async_v3(self, stream_handle: int) -> bool: ...


class Runtime(Protocol):
    """Opens plans; an engine that is None was refused."""

    def get_engine_validity(self, buffer: bytes) -> tuple[Member, SupportsInt]: ...
    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None: ...


class Refitter(Protocol):
    def get_all_weights(self) -> list[str]: ...
    def get_missing_weights(self) -> list[str]: ...
    def set_named_weights(self, name: str, weights: object) -> bool: ...
    def refit_cuda_engine(self) -> bool: ...


class _NewLogger(Protocol):
    INTERNAL_ERROR: Member

    def __call__(self, severity: Member) -> ILogger: ...


# Named here: inside of the class the library's names are those of its own attributes.
_NewBuilder = Callable[[ILogger], Builder]
_NewRuntime = Callable[[ILogger], Runtime]
_NewRefitter = Callable[[ICudaEngine, ILogger], Refitter]


class TensorRT(Protocol):
    """The module itself: `tensorrt` or `tensorrt_rtx`."""

    __name__: str
    __version__: str

    Builder: _NewBuilder
    Logger: _NewLogger
    Refitter: _NewRefitter
    Runtime: _NewRuntime
    Weights: Callable[[Member, int, int], object]  # dtype, address, number of elements

    # Classes to inherit from, to become, or to look for members in
    IAttentionInputLayer: Any
    IExecutionContext: Any
    ILogger: Any
    INetworkDefinition: Any
    IProgressMonitor: Any

    BuilderFlag: Enumeration
    ComputeCapability: Enumeration
    DataType: Enumeration
    EngineInvalidityDiagnostics: Enumeration
    EngineValidity: Enumeration
    ExecutionContextAllocationStrategy: Enumeration
    HardwareCompatibilityLevel: Enumeration
    LayerInformationFormat: Enumeration
    LayerType: Enumeration
    MemoryPoolType: Enumeration
    NetworkDefinitionCreationFlag: Enumeration
    TensorIOMode: Enumeration
    TensorLocation: Enumeration


class Recorder(ILogger, Protocol):
    """A logger that keeps the library's last errors."""

    messages: deque[str]


@functools.cache
def recorder(target: str) -> Recorder:
    """The logger of a target's library, which keeps one for the whole process."""
    trt: TensorRT = require(target)
    base: Any = trt.ILogger

    class _Recorder(base):
        def __init__(self) -> None:
            base.__init__(self)
            self.messages: deque[str] = deque(maxlen=8)

        def log(self, severity: Member, message: str) -> None:
            if severity <= base.ERROR:
                self.messages.append(message)
            log.debug("%s: %s", severity, message)

    return _Recorder()
