"""The server's side of a process that draws: started, asked, heard, ended."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from typing import Any

import psutil

from sdkd.core import processes
from sdkd.core.child import GRACE_SECONDS, Failure, end, ended_by
from sdkd.core.processes import LIBRARIES
from sdkd.serve.catalog import Served
from sdkd.serve.errors import WorkerError
from sdkd.serve.painter import Batch
from sdkd.serve.worker import work

PRELOAD = (*LIBRARIES, "sdkd.serve.worker")


class DiedError(WorkerError):
    """The process ended by itself; all that it was doing is lost."""


class Worker:
    """One process with an open engine set. Its methods are called on the server's event loop."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.number = 0
        self.alive = False
        self._said: asyncio.Queue[tuple[Any, ...] | None] = asyncio.Queue()

    async def open(self) -> None:
        """Start the process and wait until it has opened its model; raises what that failed with, or DiedError."""
        arguments = self.served.source, self.served.target
        self._process, connection = await asyncio.to_thread(
            processes.start_connected, work, arguments, f"sdkd serve: {self.served.id}", PRELOAD, daemon=True
        )
        self._line = await processes.Line.of(connection)
        self.alive = True
        self._reading = asyncio.create_task(self._read())
        said = await self._next()
        if said[0] == "failed":
            await self.close()
            raise self._error(said[2])

    @property
    def pid(self) -> int | None:
        """The number of its process."""
        return self._process.pid

    @property
    def bytes(self) -> int:
        """Memory in bytes that it does not share with other processes; before it is open, what it is expected to be."""
        if not self.alive:
            return self.served.memory_bytes
        try:
            memory = psutil.Process(self.pid).memory_info()
        except psutil.NoSuchProcess:
            return 0
        return int(memory.rss - getattr(memory, "shared", 0))

    async def _read(self) -> None:
        """Pass on what the process says, and at last that it ended."""
        with contextlib.suppress(EOFError):
            while True:
                self._said.put_nowait(await self._line.hear())
        self._line.close()
        self.alive = False
        self._said.put_nowait(None)

    async def _next(self) -> tuple[Any, ...]:
        said = await self._said.get()
        if said is None:
            self._said.put_nowait(None)  # for whoever asks next
            await asyncio.to_thread(self._process.join, GRACE_SECONDS)
            raise DiedError(self._how_it_died())
        return said

    def _how_it_died(self) -> str:
        cause = ended_by(self._process.exitcode)
        why = "a library crashed, and its log says more"
        if cause == "SIGKILL":
            why = "most likely the memory ran out: ask for a smaller size or fewer images"
        return f"the process that draws with model {self.served.id!r} was ended by {cause}: {why}"

    def _error(self, failure: Failure) -> Exception:
        return failure.error(lambda words: WorkerError(f"model {self.served.id!r} failed: {words}"))

    def draw(self, batch: Batch) -> None:
        """Begin a batch; `news` tells of it."""
        self.number += 1
        self._line.say(("draw", self.number, batch))

    async def news(self) -> tuple[Any, ...]:
        """What the process says next of the batch that it draws: `step`, `drawn` or `stopped` of sdkd.serve.worker.

        Raises what the batch failed with, DiedError where the process died.
        """
        while (said := await self._next())[1] != self.number:
            pass
        if said[0] == "failed":
            raise self._error(said[2])
        return said

    def stop_batch(self) -> None:
        """Have it leave its batch at the next step."""
        self._line.say(("stop", self.number))

    def watch(self) -> None:
        """Have it send previews of its batch from the next step on."""
        self._line.say(("watch", self.number))

    async def close(self) -> None:
        """End the process: by asking, then by signals."""
        self._line.say(None)
        gone = functools.partial(processes.gone, self._process)
        signals = self._process.terminate, self._process.kill
        await asyncio.to_thread(end, gone, (lambda: None, *signals))  # it was asked: wait for that first
        await self._reading
