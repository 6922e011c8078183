"""A server for tests: the real application on a free port, run by uvicorn in a thread of this process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from sdkd.serve.app import create_app
from sdkd.serve.running import Server, configuration, listen
from sdkd.serve.service import Service

PATIENCE_S = 120


@dataclass
class Running:
    """Where a server is, and what is behind it."""

    host: str
    port: int
    service: Service
    server: Server
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def ids(self) -> list[str]:
        return [served.id for served in self.service.catalog.all]

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S, **options)

    def on_loop(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE_S)


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait for something to be true."""
    end = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.01)
    return found


@contextlib.contextmanager
def running(models: list[str], *, drain_seconds: float = 30.0, **options: Any) -> Iterator[Running]:
    """A server of these models; `options` of `create_app`. Ends as a signal ends it."""
    app = create_app(models, preload=False, **options)
    loop = asyncio.new_event_loop()
    with listen("127.0.0.1", 0) as listening:
        server = Server(configuration(app), app.state.service, drain_seconds)
        thread = threading.Thread(target=loop.run_until_complete, args=(server.serve(sockets=[listening]),))
        thread.start()
        try:
            until(lambda: server.started or not thread.is_alive(), "the server has begun")
            assert server.started
            yield Running(*listening.getsockname()[:2], app.state.service, server, loop)
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)
            loop.close()
