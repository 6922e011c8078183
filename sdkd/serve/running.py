"""Running the application by uvicorn, from a socket that is free to an end that answers everybody."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import socket
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from sdkd.core.interrupts import ENDING, handling
from sdkd.errors import InputError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from sdkd.serve.service import Service

BACKLOG = 2048  # connections that wait to be accepted
TOGETHER_S = 1.0  # Ctrl-C reaches launchers, too, which pass it on
IDLE_S = 30  # a connection that asks nothing is kept so long


@contextlib.contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens; InputError for a port in use, an address that is not this machine's, a low port."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(
            f"host {host!r} is no address ({error.strerror}): give 127.0.0.1, or one of this machine"
        ) from error
    with listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)
        except OSError as error:
            raise InputError(_why_not(host, port, error)) from error
        listening.listen(BACKLOG)
        yield listening


def _why_not(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is in use: give --port with another one, or 0 for any that is free"
    if error.errno == errno.EACCES:
        return f"port {port} is for the system's own servers: give --port with 1024 or more"
    return f"host {host!r} is no address of this machine ({error.strerror}): give 127.0.0.1, 0.0.0.0 or one that it has"


class Protocol(H11Protocol):
    """uvicorn's, which lets go of connections that never asked anything, however slowly they say so."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        self.loop.call_later(IDLE_S, self._check_asked)

    def _check_asked(self) -> None:
        if getattr(self, "cycle", None) is None and not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's, which answers what waits before it closes connections."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float) -> None:
        super().__init__(config)
        self.service, self.drain_seconds = service, drain_seconds
        self._told: float | None = None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing new, finish what runs within the limit, answer the rest, close."""
        for server in self.servers:
            server.close()
        await self.service.drain(self.drain_seconds)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end it in order, a second one at once; afterwards they are handled as before."""
        with handling(self.handle_exit, *ENDING):
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the end; another one, unless it comes with it, does not wait for anything."""
        now = time.monotonic()
        if self._told is not None and now - self._told > TOGETHER_S:
            os.write(2, b"\nsdkd: ended at once, by a second signal\n")
            os._exit(128 + sig)
        self._told = self._told or now
        self.should_exit = True


def run(app: FastAPI, listening: socket.socket, drain_seconds: float) -> None:
    """Serve until a signal ends it."""
    _allow_many_connections()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    Server(configuration(app), app.state.service, drain_seconds).run(sockets=[listening])


def configuration(app: FastAPI) -> uvicorn.Config:
    """How uvicorn runs it: the same on every machine, whatever else is installed."""
    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=5,
    )


def _allow_many_connections() -> None:
    """As many open files as this process may have: a connection is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
