"""One TensorRT execution context: its profile, shapes, addresses and device memory, every answer checked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, MutableSequence
from contextlib import contextmanager

import torch

from engines.sessions.cuda_graphs import Shapes
from engines.sessions.graphed import Call
from sdkd.errors import EngineError
from sdkd.targets.tensorrt_api import IExecutionContext


class BoundContext:
    """An execution context, and what was last set on it; it runs, and changes its profile, once at a time.

    `managed`: whether its device memory is user-managed; `failed` makes the error for a step that failed.
    """

    def __init__(self, context: IExecutionContext, managed: bool, failed: Callable[[str], EngineError]) -> None:
        self.context = context
        self.needed = 0  # bytes of activation memory, for the shapes that are set
        self._managed, self._failed = managed, failed
        self._shapes: Shapes = {}
        self._memory: tuple[int, int] | None = None  # address and bytes of the workspace, as set for these shapes

    def prepare(self, call: Call, stream: torch.cuda.Stream) -> None:
        """Set profile and input shapes, when they differ from the last call's."""
        if call.shapes != self._shapes:
            self._shapes, self._memory = {}, None  # its layout changes, so the workspace must be set again
            self._select_profile(call.profile, stream)
            for name, shape in call.shapes.items():
                if not self.context.set_input_shape(name, shape):
                    raise self._failed(f"setting shape {shape} of input {name!r}")
            with raises_engine_error(self._failed, "inferring shapes"):
                missing = self.context.infer_shapes()
            if missing:
                raise self._failed(f"inferring shapes of {', '.join(missing)}")
            self.needed = self._measure(call.profile) if self._managed else 0
            self._shapes = call.shapes
        for name, tensor in call.outputs.items():
            found = tuple(self.context.get_tensor_shape(name))
            if found != tuple(tensor.shape):
                raise self._failed(f"giving {name!r} the contract's shape {tuple(tensor.shape)}, not {found},")

    def _select_profile(self, profile: int, stream: torch.cuda.Stream) -> None:
        """Make a profile the active one; its shapes and workspace must then be set again."""
        if profile == self.context.active_optimization_profile:
            return
        what = f"selecting optimization profile {profile}"
        with raises_engine_error(self._failed, what):
            taken = self.context.set_optimization_profile_async(profile, stream.cuda_stream)
        if not taken:
            raise self._failed(what)

    def _measure(self, profile: int) -> int:
        """Bytes of activation memory for the shapes that are set."""
        engine = self.context.engine
        # None needed, or an error that the library only logs: the whole profile's is enough in any case.
        needed = self.context.update_device_memory_size_for_shapes()
        return int(needed or engine.get_device_memory_size_for_profile_v2(profile))

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the address of every input and output."""
        for name, tensor in tensors.items():
            if not self.context.set_tensor_address(name, tensor.data_ptr()):
                raise self._failed(f"binding tensor {name!r}")

    def set_workspace(self, block: torch.Tensor | None) -> None:
        """Set the user-managed device memory: `needed` bytes or more, kept until the work is done; None for none.

        Needed after every change of shapes, even for the same block as before.
        """
        memory = (0, 0) if block is None else (block.data_ptr(), block.numel())
        if self._managed and memory != self._memory:
            self.context.set_device_memory(*memory)
            self._memory = memory

    def enqueue(self, stream: int) -> None:
        """Queue one run on a stream, by its handle."""
        if not self.context.execute_async_v3(stream):
            raise self._failed("queueing the engine")


@contextmanager
def raises_engine_error(failed: Callable[[str], EngineError], what: str) -> Iterator[None]:
    """EngineError, made by `failed`, for a step where the bindings raise RuntimeError or TypeError."""
    try:
        yield
    except (RuntimeError, TypeError) as error:
        raise failed(f"{what} ({' '.join(str(error).split()) or repr(error)})") from error


def failure(label: str, library: str, messages: MutableSequence[str], what: str) -> EngineError:
    """The error for a step that failed, with what the library logged last, which is then forgotten."""
    error = EngineError(f"{label}: {what} failed{library_reason(library, messages)}")
    messages.clear()
    return error


def library_reason(library: str, messages: Collection[str]) -> str:
    """The end of a message: the library that refused, and the errors that it logged."""
    return f" by {library} ({'; '.join(messages)})" if messages else ""
