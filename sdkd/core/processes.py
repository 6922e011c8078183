"""Processes that draw, one for each subject or engine set.

On Linux they are forked from a server that has imported what all of them need (`LIBRARIES`), so that a fresh process
costs milliseconds; where torch sees a GPU, and elsewhere, each is spawned, because a GPU that any library looked at
before a fork cannot be used after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sdkd.core.child import inherited, live_as_child
from sdkd.core.interrupts import handling

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkServerContext, SpawnContext

# What is needed before anything is drawn. The server that processes are forked from imports these, too, so nothing in
# them may start a thread that computes or touch a GPU: neither survives a fork.
LIBRARIES = (
    "accelerate",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.schedulers",
    "safetensors.torch",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "engines.pipelines.pipeline",
    "sdkd.models.resolve",
)

# How `multiprocessing.connection.Connection` sends a message: its length, of more than 2 GB after a sign for that.
_LENGTH, _LONG, _LONG_LENGTH = struct.Struct("!i"), -1, struct.Struct("!Q")
_BUFFER = 2**20  # bytes of a message that are taken before somebody asks for it


def context(preload: Sequence[str]) -> ForkServerContext | SpawnContext:
    """How processes are started here; `preload`: the modules that their server imports."""
    import torch

    if sys.platform != "linux" or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(list(preload))
    return found


def prepare(preload: Sequence[str]) -> None:
    """Start the server that processes are forked from, in the background; does nothing where there is none."""
    if context(preload).get_start_method() == "forkserver":
        from multiprocessing.forkserver import ensure_running

        with _no_interrupts(), inherited():
            ensure_running()


def start(process: Any, preload: Sequence[str]) -> None:
    """Start a process of `context` that never hears Ctrl-C, which ends this process, and so that one."""
    prepare(preload)
    # From a server that may still import: must hear Ctrl-C.
    forked = context(preload).get_start_method() == "forkserver"
    with contextlib.nullcontext() if forked else _no_interrupts(), inherited():
        process.start()


def start_connected(
    target: Callable[..., None], arguments: tuple[Any, ...], name: str, preload: Sequence[str], *, daemon: bool = False
) -> tuple[Any, Connection]:
    """Start `target(connection, *arguments)` in a process, as `start`; returns it and this end of the connection."""
    made = context(preload)
    ours, theirs = made.Pipe()
    try:
        process: Any = made.Process(target=target, args=(theirs, *arguments), name=name, daemon=daemon)
        start(process, preload)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()  # else the end of the child would not be the end of the pipe
    return process, ours


def say(connection: Connection, what: object) -> None:
    """As `connection.send`, which makes a table of how to pickle sockets and locks for each message first."""
    connection.send_bytes(pickle.dumps(what))


class Line:
    """A connection to a process, on an event loop: nothing else waits while a message is on its way."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def of(cls, connection: Connection) -> Line:
        """The line in the place of the connection, which is closed."""
        with connection:
            made = socket.socket(fileno=os.dup(connection.fileno()))
        return cls(*await asyncio.open_unix_connection(sock=made, limit=_BUFFER))

    def say(self, what: object) -> None:
        """Send something; nobody hears it where the process has ended."""
        data = pickle.dumps(what)
        self._writer.write(_LENGTH.pack(len(data)) + data)

    async def hear(self) -> Any:
        """What the process sends next; EOFError where it has ended."""
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if length == _LONG:
                (length,) = _LONG_LENGTH.unpack(await self._reader.readexactly(_LONG_LENGTH.size))
            return pickle.loads(await self._reader.readexactly(length))  # noqa: S301 - of our own process
        except OSError as error:
            raise EOFError from error

    def close(self) -> None:
        """Hang up."""
        self._writer.close()


def begin() -> None:
    """What such a process does first: it ends with its parent, and leaves nothing behind when it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    live_as_child(parent.join)
    _use_no_semaphores()


def gone(process: Any, seconds: float) -> bool:
    """Whether a process ends within so many seconds."""
    process.join(seconds)
    return not process.is_alive()


def _no_interrupts() -> contextlib.AbstractContextManager[None]:
    """Processes that are started within ignore SIGINT; only the main thread can arrange for that."""
    return handling(signal.SIG_IGN, signal.SIGINT)


def _use_no_semaphores() -> None:
    """Have tqdm lock among threads only: a killed process would leave its lock among processes behind."""
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())
