"""CUDA graphs of an engine's runs, one per profile and input shapes: when they are made, kept and dropped.

The first call of a shape runs plainly, so that a shape that comes once costs no memory. The second runs in an execution
context of its own, on static buffers, and is captured; later calls copy their inputs in, replay, and copy the outputs
out. A graph is tied to the state of its context, whose persistent memory changes with its shapes, and to every address:
so each graph has a context that is never given other ones, and holds its buffers and activation memory.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from typing import Generic, TypeVar

import torch

from engines.sessions.out_of_memory import CAPTURING
from sdkd.core.collection import paused_gc

log = logging.getLogger(__name__)

CAPACITY = 8  # graphs of one session
REMEMBERED = 64  # shapes that were seen once

STREAMS = 32  # that torch has of each priority, and hands out round-robin
_taken: set[tuple[torch.device, int]] = set()
_taking = threading.Lock()

Shapes = Mapping[str, tuple[int, ...]]
"""The shape of every input of a call."""
Key = tuple[int, tuple[tuple[str, tuple[int, ...]], ...]]
Entry = TypeVar("Entry")


def own_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream that no other session has for as long as this one is held, of a priority that is seldom asked for; None
    when each has an owner. What others queue on a stream while it is captured would be captured, too.
    """
    with _taking:
        for _ in range(STREAMS):
            stream = torch.cuda.Stream(device, priority=-1)
            key = (device, stream.cuda_stream)
            if key not in _taken:
                _taken.add(key)
                weakref.finalize(stream, _taken.discard, key)
                return stream
    return None


def graph_key(profile: int, shapes: Shapes) -> Key:
    """What one graph is for: an optimization profile and the shape of every input."""
    return profile, tuple(sorted(shapes.items()))


class GraphCache(Generic[Entry]):
    """The graphs of one session: the latest used ones, none of a shape's first call, none once they were switched off.

    `free` is given each entry that is dropped. Not thread-safe: sessions run one call at a time.
    """

    def __init__(self, free: Callable[[Entry], None]) -> None:
        self.off = ""  # the reason why there are no graphs
        self._free = free
        self._entries: OrderedDict[Key, Entry] = OrderedDict()
        self._seen: OrderedDict[Key, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: Key) -> Entry | None:
        """The graph of a shape, which becomes the latest used one."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def due(self, key: Key) -> bool:
        """Whether this call of a shape without a graph is to make one: its second, while graphs are on."""
        if self.off:
            return False
        if key in self._seen:
            return True
        self._seen[key] = None
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        return False

    def put(self, key: Key, entry: Entry) -> None:
        """Keep a graph; the one that was not used for longest is dropped when there are too many."""
        self._seen.pop(key, None)  # once dropped, it needs two calls again: many alternating shapes seldom capture
        self._entries[key] = entry
        while len(self._entries) > CAPACITY:
            _, oldest = self._entries.popitem(last=False)
            self._free(oldest)

    def clear(self) -> None:
        """Drop all: weights or the engine changed."""
        self._seen.clear()
        while self._entries:
            _, entry = self._entries.popitem(last=False)
            self._free(entry)

    def disable(self, label: str, reason: str) -> None:
        """No graphs from now on; the reason is logged, once."""
        if not self.off:
            self.off = reason
            log.warning("%s runs without CUDA graphs: %s", label, reason)
        self.clear()


class Buffers:
    """Tensors at addresses that never change: inputs that calls are copied into, outputs that are copied out.

    No two share memory, and none with a caller's tensor.
    """

    def __init__(self, feeds: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        # Made in inference mode they could not be written outside of it, by a later call.
        with torch.inference_mode(False):
            self.inputs = {name: torch.empty(t.shape, dtype=t.dtype, device=t.device) for name, t in feeds.items()}
            self.outputs = {name: torch.empty(t.shape, dtype=t.dtype, device=t.device) for name, t in outputs.items()}

    def fill(self, feeds: Mapping[str, torch.Tensor]) -> None:
        """Copy a call's inputs in, on the current stream."""
        for name, tensor in self.inputs.items():
            tensor.copy_(feeds[name])

    def give(self, outputs: Mapping[str, torch.Tensor]) -> None:
        """Copy the outputs to a call's own tensors, on the current stream: the next run overwrites the buffers."""
        for name, tensor in self.outputs.items():
            outputs[name].copy_(tensor)


class ShapeGraph:
    """One shape and profile: static buffers, a context bound to them, and the CUDA graph of its work.

    `enqueue` queues the work on a stream, by its handle, and holds the context; it raises when it fails. `workspace` is
    the context's user-managed device memory. Without `capture`, each run queues the work; with `native` the
    library then captures and replays by itself (TensorRT-RTX).
    """

    def __init__(
        self, buffers: Buffers, enqueue: Callable[[int], None], workspace: torch.Tensor | None, native: bool = False
    ) -> None:
        self.buffers = buffers
        self._lock = CAPTURING if native else nullcontext()  # nobody says which of the runs captures
        self._enqueue: Callable[[int], None] | None = enqueue
        self._workspace = workspace
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ran = torch.cuda.Event()

    def run(
        self, feeds: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor], stream: torch.cuda.Stream
    ) -> None:
        """Fill a call's outputs from its inputs, all on one stream."""
        assert self._enqueue is not None, "this graph was dropped"
        with torch.cuda.stream(stream):
            self.buffers.fill(feeds)
            if self._graph is None:
                with self._lock:
                    self._enqueue(stream.cuda_stream)
            else:
                self._graph.replay()
            self.buffers.give(outputs)
        self._ran.record(stream)

    def capture(self, stream: torch.cuda.Stream) -> None:
        """Capture the work, after a run on the same stream; EngineError or RuntimeError when that fails.

        The stream must be no one else's: what other threads queue on it would be captured, too. It is out of capture
        afterwards, also when that failed. torch.cuda.graph would leave it the current stream then.
        """
        assert self._enqueue is not None, "this graph was dropped"
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        # An execution context among the garbage would free memory of the GPU, and break the capture.
        with CAPTURING, paused_gc(), torch.cuda.stream(stream):
            try:
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # others may use the GPU as they like
                self._enqueue(stream.cuda_stream)
                graph.capture_end()
            except BaseException:
                _abandon(graph, pool, stream.device)
                raise
        self._graph = graph

    def close(self) -> None:
        """Give all memory back, once the last run is done."""
        self._ran.synchronize()
        if self._graph is not None:
            self._graph.reset()
        self._graph = self._enqueue = self._workspace = None
        self.buffers.inputs.clear()
        self.buffers.outputs.clear()


_abandoned: list[torch.cuda.CUDAGraph] = []  # torch's allocators may ask for them as long as the process lives


def _abandon(graph: torch.cuda.CUDAGraph, pool: torch.cuda._POOL_HANDLE, device: torch.device) -> None:
    """Undo, on the current stream, what a failed capture began: torch itself does so only after one that succeeded."""
    with suppress(RuntimeError):
        graph.capture_end()  # the stream is out of capture after this, though it raises
    if hasattr(torch._C, "_cuda_endAllocateToPool"):  # else events of freed memory would be put off for ever
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device.index, pool)
    graph.reset()
    _abandoned.append(graph)
    # Some versions of torch refuse random numbers on the GPU until the next capture has ended well.
    with suppress(RuntimeError):
        number, again = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
        number.add_(1)  # kernels are loaded at their first use, better outside of a capture
        again.capture_begin(capture_error_mode="thread_local")
        try:
            number.add_(1)
        finally:
            again.capture_end()
        again.reset()


def synchronize(device: torch.device) -> None:
    """Wait for all work on a device, and for a capture under way, which this would break."""
    with CAPTURING:
        torch.cuda.synchronize(device)
