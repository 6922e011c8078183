"""What sessions on a GPU share: shapes that come again run through CUDA graphs, on a stream of the session's own.

See `engines.sessions.cuda_graphs` for when graphs are made, kept and dropped.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from engines.sessions.base import EngineSession
from engines.sessions.cuda_graphs import STREAMS, GraphCache, ShapeGraph, Shapes, graph_key, own_stream
from sdkd.errors import EngineError


@dataclass(frozen=True)
class Call:
    """One run of an engine: contiguous tensors on its device, and the optimization profile for their shapes."""

    feeds: Mapping[str, torch.Tensor]
    outputs: Mapping[str, torch.Tensor]
    profile: int
    shapes: Shapes


class GraphedSession(EngineSession):
    """A session that can capture its calls; graphs always run on its own stream, so that nothing else is captured."""

    _native = False  # whether the library captures and replays by itself

    def _start_graphs(self, cuda_graphs: bool | None) -> None:
        """Make the stream and the empty cache, on the session's CUDA device; no graphs where `cuda_graphs` is False."""
        own = own_stream(self.device)
        self._side = own or torch.cuda.Stream(self.device, priority=-1)
        self._done = torch.cuda.Event()  # of the last run
        self._graphs: GraphCache[ShapeGraph] = GraphCache(ShapeGraph.close)
        if cuda_graphs is False:
            self._graphs.off = "cuda_graphs=False"
        elif own is None:
            self._graphs.disable(self.checked.label, f"{STREAMS} other engines have the streams to capture on")

    @abstractmethod
    def _make_graph(self, call: Call) -> ShapeGraph:
        """Buffers and work for one shape, bound to one another once and for all; EngineError or RuntimeError."""

    def _drop_graphs(self) -> None:
        """Let go of all graphs, and of what they share."""
        self._graphs.clear()

    def _run_graph(self, call: Call, current: torch.cuda.Stream) -> bool:
        """Run through the shape's graph, which its second call makes; False where the call is to run plainly."""
        key = graph_key(call.profile, call.shapes)
        graph = self._graphs.find(key)
        if graph is None and not self._graphs.due(key):
            return False
        self._side.wait_event(self._done)  # one run at a time: graphs share memory
        if graph is None:
            return self._start_graph(call, current)
        self._side.wait_stream(current)
        try:
            graph.run(call.feeds, call.outputs, self._side)
        finally:
            self._done.record(self._side)
            current.wait_stream(self._side)
        return True

    def _start_graph(self, call: Call, current: torch.cuda.Stream) -> bool:
        """Run on static buffers, then capture: libraries want one run of a shape first. False when it did not run."""
        ran = False
        try:
            graph = self._make_graph(call)
            self._side.wait_stream(current)  # inputs and static buffers come from the current stream
            graph.run(call.feeds, call.outputs, self._side)
            ran = True
            if not self._native:  # TensorRT-RTX captures by itself, once its kernels for the shape are compiled
                graph.capture(self._side)
            self._graphs.put(graph_key(call.profile, call.shapes), graph)
        except (EngineError, RuntimeError) as error:  # no memory, an operation that cannot be captured
            self._side.synchronize()  # what is freed now may be in use
            self._graphs.disable(self.checked.label, (str(error).splitlines() or [repr(error)])[0])
            self._drop_graphs()
        finally:
            self._done.record(self._side)
            current.wait_stream(self._side)
        return ran
