"""`sdkd serve` as a process of its own, and clients that ask it as people's programs do."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil

PATIENCE_S = 600
_HERE = threading.local()


@dataclass
class Answer:
    """What a client got for a request, when it asked and when it had it (seconds of one clock)."""

    status: int
    body: dict[str, Any]
    asked: float
    answered: float

    @property
    def seconds(self) -> float:
        """How long it waited."""
        return self.answered - self.asked

    @property
    def pixels(self) -> Any:
        """Its first image, as numbers."""
        import numpy as np
        from PIL import Image

        data = base64.b64decode(self.body["images"][0]["png"])
        return np.asarray(Image.open(io.BytesIO(data)), dtype=np.int16)


class Server:
    """A server that runs, and its process."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    def ask(self, wanted: Mapping[str, Any]) -> Answer:
        """One request over this thread's own connection, which is kept."""
        connection = getattr(_HERE, "connection", None)
        if connection is None or connection.port != self.port:
            connection = _HERE.connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        asked = time.perf_counter()
        connection.request("POST", "/api/images", json.dumps(dict(wanted)), {"content-type": "application/json"})
        answer = connection.getresponse()
        body = answer.read()
        return Answer(answer.status, json.loads(body), asked, time.perf_counter())

    def get(self, path: str) -> Any:
        """What it answers to a GET, as text."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=30) as answer:
            return answer.read().decode()

    def workers(self) -> list[psutil.Process]:
        """The processes that draw: those that hold most, below the server."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in children if one.memory_info().rss > 200e6 and not one.children()]

    def memory(self) -> dict[str, int]:
        """Bytes that the server's process and its workers hold for themselves."""
        server = psutil.Process(self.process.pid)
        return {"server": own_bytes(server), "workers": sum(own_bytes(one) for one in self.workers())}


def own_bytes(process: psutil.Process) -> int:
    """Memory that a process does not share."""
    return int(process.memory_full_info().uss)


@contextlib.contextmanager
def serving(models: Sequence[str], log: Path, *words: str) -> Iterator[Server]:
    """`sdkd serve` of some models on a free port, with its first model loaded; ended by SIGTERM."""
    command = [sys.executable, "-m", "sdkd.cli", "serve", *models, "--port", "0", *words]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True)
    try:
        assert process.stdout
        server = Server(process, _port(process.stdout))
        end = time.monotonic() + PATIENCE_S
        while not _loaded(server):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server did not begin: {log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _port(lines: Iterator[str]) -> int:
    for line in lines:
        if found := re.search(r"page http://127\.0\.0\.1:(\d+)/", line):
            return int(found[1])
    raise SystemExit("the server ended before it said where it is")


def _loaded(server: Server) -> bool:
    try:
        return bool(json.loads(server.get("/health"))["loaded"])
    except urllib.error.URLError:
        return False


def by_clients(server: Server, wishes: Sequence[Mapping[str, Any]], clients: int) -> list[Answer]:
    """All requests, by so many clients at once, each of which asks for the next one when it has its image."""
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(server.ask, wishes))


def mixed_requests(
    count: int, steps: int, sizes: Sequence[tuple[int, int]], prompts: Sequence[str]
) -> list[dict[str, Any]]:
    """Requests of mixed prompts and sizes (width, height), each of a seed of its own; the first size most often."""
    chosen = random.Random(0)
    weights = [2, *[1] * (len(sizes) - 1)]
    found = []
    for seed in range(count):
        width, height = chosen.choices(sizes, weights)[0]
        prompt = chosen.choice(prompts)
        found.append({"prompt": prompt, "seed": seed, "width": width, "height": height, "steps": steps})
    return found


@contextlib.contextmanager
def others(server: Server, wishes: Sequence[Mapping[str, Any]], clients: int) -> Iterator[Callable[[], list[Answer]]]:
    """Clients that go on asking while something else happens; the function given ends them and has their answers."""
    ended, answers, at = threading.Event(), list[Answer](), iter(range(1 << 30))

    def client() -> None:
        while not ended.is_set():
            answers.append(server.ask(wishes[next(at) % len(wishes)]))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()

    def end() -> list[Answer]:
        ended.set()
        for thread in threads:
            thread.join()
        return answers

    try:
        yield end
    finally:
        end()
