"""The server's side of a process that draws: started, asked, heard, ended."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
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
        self._loop = asyncio.get_running_loop()
        self._said: asyncio.Queue[tuple[Any, ...] | None] = asyncio.Queue()
        self._name = f"sdkd serve: {served.id}"

    async def open(self) -> None:
        """Start the process and wait until it has opened its model; raises what that failed with, or DiedError."""
        await asyncio.to_thread(self._start)
        self.alive = True
        self._reader = threading.Thread(target=self._read, daemon=True, name=self._name)
        self._reader.start()
        said = await self._next()
        if said[0] == "failed":
            await self.close()
            raise self._error(said[2])

    def _start(self) -> None:
        arguments = self.served.source, self.served.target
        self._process, self._connection = processes.start_connected(work, arguments, self._name, PRELOAD, daemon=True)

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

    def _read(self) -> None:
        """In a thread: pass on what the process says, and at last that it ended."""
        said: tuple[Any, ...] | None = ()
        while said is not None:
            try:
                said = self._connection.recv()
            except (EOFError, OSError):
                said = None
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                self._loop.call_soon_threadsafe(self._heard, said)

    def _heard(self, said: tuple[Any, ...] | None) -> None:
        if said is None:
            self.alive = False
        self._said.put_nowait(said)

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
        self._send(("draw", self.number, batch))

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
        self._send(("stop", self.number))

    def watch(self) -> None:
        """Have it send previews of its batch from the next step on."""
        self._send(("watch", self.number))

    def _send(self, asked: tuple[Any, ...] | None) -> None:
        with contextlib.suppress(OSError):  # it died: the reader says so
            processes.say(self._connection, asked)

    async def close(self) -> None:
        """End the process: by asking, then by signals."""
        gone, ask = functools.partial(processes.gone, self._process), functools.partial(self._send, None)
        await asyncio.to_thread(end, gone, (ask, self._process.terminate, self._process.kill))
        await asyncio.to_thread(self._reader.join, GRACE_SECONDS)
        self._connection.close()
        self.alive = False
