"""A stand-in for the server behind the page: its files, its policy, and the native API with made-up images."""

from __future__ import annotations

import asyncio
import base64
import copy
import io
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from PIL import Image

import sdkd.core

PAGE = Path(sdkd.core.__file__).parents[1] / "serve" / "page"
POLICY = "default-src 'self'; img-src 'self' data: blob:; style-src 'self'; script-src 'self'"
RANDOM_SEED = 4242  # what the stand-in draws for a request without a seed
FIXED = {"batch": [1, 1, 4], "height": [64, 64, 64], "width": [64, 64, 64]}
WIDE = {"batch": [1, 1, 2], "height": [32, 64, 128], "width": [64, 64, 128]}
TEXT_TO_SECONDS = {"eager": 4.0, "openvino": 2.0, "onnxruntime": 1.0}


def model(name: str, target: str, **changes: Any) -> dict[str, Any]:
    """One entry of /api/about."""
    first = target == "openvino"
    own = {"width": 64, "height": 64, "multiple": 8, "steps": 25, "guidance_scale": 7.5, "scheduler": None}
    takes = {
        "own_scheduler": "DDIMScheduler",
        "takes": ["text", "image", "mask"],
        "few_steps": False,
        "loaded": False,
        "negative_prompt": True,
    }
    identity = {"id": name if first else f"{name}:{target}", "name": name, "target": target, "default": first}
    return {**identity, **own, **takes, "ranges": [], **changes}


ABOUT: dict[str, Any] = {
    "version": "0.1.0",
    "models": [
        model("tiny", "openvino", ranges=[FIXED]),
        model("tiny", "eager"),
        model("quick", "onnxruntime", ranges=[WIDE], steps=4, guidance_scale=1.0, few_steps=True, takes=["text"]),
    ],
    "schedulers": ["ddim", "euler", "lcm"],
    "loras": ["chalk", "ink"],
    "limits": {
        "steps": 150,
        "n": 8,
        "pixels": 4194304,
        "body_bytes": 33554432,
        "queue": 64,
        "prompt_characters": 10000,
        "loras": 8,
    },
    "auth": False,
}


@dataclass
class Stand:
    """What the stand-in was asked, and how it answers."""

    url: str = ""
    about: dict[str, Any] = field(default_factory=lambda: copy.deepcopy(ABOUT))
    key: str | None = None
    step_s: float = 0.002
    pause_at: int | None = None  # a step to stay at until this is None again
    batch: int = 1
    position: int = 0
    notes: list[str] = field(default_factory=list)
    wanted: list[dict[str, Any]] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # jobs whose stream the page closed
    over: set[str] = field(default_factory=set)
    cancelled: set[str] = field(default_factory=set)

    def named(self, name: str | None) -> dict[str, Any]:
        """The model of this id; the first without one."""
        return next(each for each in self.about["models"] if name in (None, each["id"]))


def picture(seed: int, width: int, height: int, sharp: float = 1.0) -> bytes:
    """A PNG that depends on the seed; `sharp` less than 1: noisier, as a preview is."""
    shades = [(seed * step) % 200 + 30 for step in (37, 71, 113)]
    image = Image.new("RGB", (width, height))
    places = [(x, y) for y in range(height) for x in range(width)]
    inside = [(x - width / 2) ** 2 + (y - height * 0.55) ** 2 < (min(width, height) * 0.3) ** 2 for x, y in places]
    ground = [[int(shade * (0.35 + 0.5 * y / height)) for shade in shades] for _, y in places]
    ball = [255 - shade for shade in shades]
    rows = [
        [int(v * sharp + 90 * (1 - sharp)) for v in (ball if hit else low)]
        for hit, low in zip(inside, ground, strict=True)
    ]
    image.putdata([tuple(row) for row in rows])
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def refusal(status: int, message: str) -> JSONResponse:
    body = {"error": {"message": message, "type": "refused", "code": status}, "detail": message}
    return JSONResponse(body, status_code=status)


def refused(stand: Stand, wanted: dict[str, Any]) -> JSONResponse | None:
    """Errors on demand, by the prompt."""
    words = {"refuse": (400, "steps is 999: give 1 to 150"), "full": (429, "the queue is full: 64 jobs wait")}
    status, message = words.get(wanted["prompt"], (0, ""))
    return refusal(status, message) if status else None


def timing(stand: Stand, wanted: dict[str, Any]) -> dict[str, Any]:
    whole = TEXT_TO_SECONDS[stand.named(wanted.get("model"))["target"]]
    parts = {"text_s": whole * 0.05, "steps_s": whole * 0.85, "decode_s": whole * 0.1}
    return {"queued_s": 0.2, **parts, "total_s": whole + 0.2, "batch": max(stand.batch, wanted.get("n", 1))}


def drawn(stand: Stand, wanted: dict[str, Any], index: int) -> dict[str, Any]:
    served = stand.named(wanted.get("model"))
    seed = wanted.get("seed", RANDOM_SEED) + index
    width, height = wanted.get("width", served["width"]), wanted.get("height", served["height"])
    settings = {"prompt": wanted["prompt"], "seed": str(seed), "model": served["name"], "target": served["target"]}
    settings |= {"steps": str(wanted["steps"]), "guidance_scale": str(wanted["guidance_scale"])}
    settings |= {"size": f"{height}x{width}", "scheduler": wanted.get("scheduler", served["own_scheduler"])}
    if "strength" in wanted:
        settings["strength"] = str(wanted["strength"])
    png = encoded(picture(seed, width, height))
    size = {"index": index, "seed": seed, "width": width, "height": height}
    return {**size, "png": png, "settings": settings, "notes": stand.notes, "timing": timing(stand, wanted)}


def event(kind: str, data: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"


async def drawing(stand: Stand, wanted: dict[str, Any], job: str) -> AsyncIterator[str]:
    """The events of a job. "break" as prompt: it fails half way."""
    steps = wanted["steps"]
    seed = wanted.get("seed", RANDOM_SEED)
    try:
        yield event("queued", {"id": job, "position": stand.position})
        for step in range(1, steps + 1):
            await asyncio.sleep(stand.step_s)
            while stand.pause_at is not None and step > stand.pause_at and job not in stand.cancelled:
                await asyncio.sleep(0.01)
            if job in stand.cancelled:
                yield event("cancelled", {"id": job})
                return
            preview = f"data:image/png;base64,{encoded(picture(seed, 8, 8, step / steps))}"
            left = None if step == 1 else (steps - step) * 0.5
            progress = {"id": job, "step": step, "steps": steps, "fraction": step / steps}
            yield event("progress", {**progress, "eta_s": left, "preview": preview})
            if wanted["prompt"] == "break" and step == 2:
                yield event("error", {"message": "the engine ran out of memory", "type": "failed", "code": 500})
                return
        for index in range(wanted.get("n", 1)):
            yield event("image", drawn(stand, wanted, index))
        yield event("done", {"id": job, "timing": timing(stand, wanted)})
        stand.over.add(job)
    except (asyncio.CancelledError, GeneratorExit):
        stand.left.append(job)
        raise


def application(stand: Stand) -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def guard(request: Request, go_on: Any) -> Response:
        is_open = request.url.path == "/" or request.url.path.startswith("/page/")
        if not is_open and stand.key and request.headers.get("Authorization") != f"Bearer {stand.key}":
            return refusal(401, "an API key is needed")
        response: Response = await go_on(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response

    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/api/about")
    async def about() -> dict[str, Any]:
        return stand.about

    @app.post("/api/images")
    async def images(request: Request) -> Response:
        wanted = await request.json()
        stand.wanted.append(wanted)
        job = f"job-{len(stand.wanted)}"
        return refused(stand, wanted) or StreamingResponse(drawing(stand, wanted, job), media_type="text/event-stream")

    @app.delete("/api/images/{job}")
    async def cancel(job: str) -> Response:
        stand.deleted.append(job)
        if job in stand.over:
            return refusal(404, f"there is no job {job}")
        stand.cancelled.add(job)
        return Response(status_code=204)

    @app.post("/api/png-info")
    async def png_info(request: Request) -> dict[str, Any]:
        wanted = await request.json()
        written = Image.open(io.BytesIO(base64.b64decode(wanted["png"]))).info
        return {"settings": written, "parameters": ""}

    app.mount("/page", StaticFiles(directory=PAGE))
    return app


@contextmanager
def standing() -> Iterator[Stand]:
    """The stand-in on a free port, in a thread."""
    stand = Stand()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        stand.url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        config = uvicorn.Config(application(stand), log_level="error", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield stand
        server.should_exit = True
        thread.join(10)
