"""The processes of a server: loaded when they are asked for, ended when others need their memory."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from sdkd.bundle.memory import size
from sdkd.errors import InputError
from sdkd.serve.catalog import Catalog, Served
from sdkd.serve.jobs import Item
from sdkd.serve.metrics import Metrics
from sdkd.serve.workers import Worker

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Lane:
    """One engine set: images that wait for it, its process while it is loaded, and those that are being drawn."""

    served: Served
    waiting: deque[Item] = field(default_factory=deque)
    worker: Worker | None = None
    drawing: list[Item] = field(default_factory=list)
    used: float = 0.0
    task: asyncio.Task[None] | None = None

    @property
    def oldest(self) -> float:
        """When the request was made that has waited longest; infinity where none waits."""
        return min((item.job.asked for item in self.waiting), default=float("inf"))

    def ready(self) -> bool:
        """Whether its process is there."""
        return self.worker is not None and self.worker.alive

    def bytes(self) -> int:
        """Memory of its process."""
        return self.worker.bytes if self.worker is not None else 0


def check_fits(catalog: Catalog, memory_bytes: Mapping[str, int]) -> None:
    """InputError for an engine set that alone takes more than all may together."""
    for served in catalog.all:
        if served.memory_bytes > memory_bytes[served.place]:
            raise InputError(
                f"model {served.id!r} needs about {size(served.memory_bytes)}, and {size(memory_bytes[served.place])} "
                "are for all models: give --memory-gb more, close other programs, or serve a smaller model"
            )


class Fleet:
    """The lanes of all engine sets. `memory_bytes`: what loaded ones may take together, by place."""

    def __init__(self, catalog: Catalog, memory_bytes: Mapping[str, int], metrics: Metrics) -> None:
        self.lanes = {served.id: Lane(served) for served in catalog.all}
        self._memory, self._metrics = memory_bytes, metrics
        self._loading = asyncio.Lock()
        self._wanting: Lane | None = None  # what waits for room
        self._change = asyncio.Event()
        for name, lane in self.lanes.items():
            metrics.loaded.labels(name).set_function(lane.ready)
            metrics.bytes.labels(name).set_function(lane.bytes)

    def changed(self) -> None:
        """Something was drawn or unloaded: who waits for room looks again."""
        event, self._change = self._change, asyncio.Event()
        event.set()

    async def load(self, lane: Lane) -> None:
        """Have a lane's process open, after what was used longest ago made room for it; raises what opening raises."""
        if lane.ready():
            return
        async with self._loading:
            if lane.ready():
                return
            if lane.worker is not None:
                self.lost(lane)
            worker = Worker(lane.served)
            try:
                self._wanting = lane
                await self._make_room(lane, worker.bytes)
            finally:
                self._wanting = None
                self.changed()
            log.info("loading %s", lane.served.id)
            await worker.open()
            lane.worker, lane.used = worker, time.monotonic()
            self._metrics.loads.labels(lane.served.id).inc()

    async def _make_room(self, lane: Lane, need: int) -> None:
        while True:
            others = [one for one in self.lanes.values() if one.served.place == lane.served.place and one.worker]
            if sum(one.bytes() for one in others) + need <= self._memory[lane.served.place]:
                return
            if not others:
                return  # alone it must do: `check_fits` looked at the start
            idle = [one for one in others if not one.drawing and one.oldest > lane.oldest]
            if idle:
                await self._unload(min(idle, key=lambda one: one.used))
            else:
                await self._change.wait()

    async def give_way(self, lane: Lane) -> None:
        """Between two batches: wait while a lane with an older request needs this one's room."""
        while (other := self._wanting) is not None and other.oldest < lane.oldest < float("inf"):
            if other.served.place != lane.served.place:
                return
            await self._change.wait()

    def lost(self, lane: Lane) -> None:
        """Its process died."""
        self._metrics.deaths.labels(lane.served.id).inc()
        lane.worker = None

    async def _unload(self, lane: Lane) -> None:
        worker, lane.worker = lane.worker, None
        if worker is not None:
            log.info("unloading %s", lane.served.id)
            await worker.close()
            self.changed()

    async def close(self) -> None:
        """End all processes."""
        await asyncio.gather(*(self._unload(lane) for lane in self.lanes.values()))
