"""The server's own API: what its page uses, and what programs use that want progress, previews and times."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from sdkd import __version__
from sdkd.core.profiles import ShapeRanges
from sdkd.models.schedulers import SCHEDULERS
from sdkd.serve.catalog import Served
from sdkd.serve.encoding import PARAMETERS, text_in
from sdkd.serve.errors import UnknownNameError, answer
from sdkd.serve.jobs import Drawn, Event, Job, Result
from sdkd.serve.parameters import read
from sdkd.serve.uploads import from_base64
from sdkd.serve.wanted import LoraWish, Wanted

if TYPE_CHECKING:
    from sdkd.serve.service import Service


class LoraField(BaseModel):
    """A LoRA by its name in the server's folder, and its strength."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(description="Its file's name in the server's folder, without the ending.")
    strength: float = Field(1.0, description="How strongly it is added.")


class ImageRequest(BaseModel):
    """Images to draw; all but the prompt is the model's own where it is left out."""

    model_config = ConfigDict(extra="forbid")
    prompt: str = Field(description="What to draw.")
    model: str | None = Field(None, description="An id of /api/about; the server's first model by default.")
    negative_prompt: str | None = Field(None, description="What to keep out of the image.")
    width: int | None = Field(None, description="Pixels.")
    height: int | None = Field(None, description="Pixels.")
    steps: int | None = Field(None, description="Denoising steps.")
    guidance_scale: float | None = Field(None, description="1 or less: no guidance.")
    scheduler: str | None = Field(None, description="A name of /api/about, or a diffusers class.")
    seed: int | None = Field(None, description="Of the first image, the next ones count up; by chance by default.")
    n: int = Field(1, description="Number of images.")
    loras: list[LoraField] = Field(default_factory=list, description="LoRAs to add.")
    image: str | None = Field(None, description="An image file to start from, in base64 or as a data URI.")
    mask: str | None = Field(None, description="Its mask, white is drawn again: an image file, as above.")
    strength: float | None = Field(None, description="How much of the image to change, 0 to 1.")
    stream: bool = Field(False, description="Answer with server-sent events: progress, previews, images.")


class PngRequest(BaseModel):
    """A PNG to read the settings of."""

    model_config = ConfigDict(extra="forbid")
    png: str = Field(description="The file in base64 or as a data URI.")


def wanted_of(asked: ImageRequest, service: Service) -> Wanted:
    """A request as data; InputError for base64 that is none."""

    def file(name: str) -> bytes | None:
        text = getattr(asked, name)
        return None if text is None else from_base64(text, name, service.limits)

    plain = asked.model_dump(exclude={"stream", "loras", "image", "mask"})
    loras = tuple(LoraWish(one.name, one.strength) for one in asked.loras)
    return Wanted(**plain, loras=loras, image=file("image"), mask=file("mask"))


async def answered(service: Service, request: Request, wanted: Wanted, api: str) -> Result:
    """Draw what is wanted; raises what it fails with. When the client leaves, its work ends at the next step."""
    job = await service.submit(wanted, api)
    leaving = asyncio.create_task(_cancel_when_gone(service, request, job.id))
    try:
        return await job.result()
    finally:
        service.cancel(job.id)  # where this task was cancelled itself
        leaving.cancel()


async def _cancel_when_gone(service: Service, request: Request, job_id: str) -> None:
    """Wait until the client has left, and take its request back."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    service.cancel(job_id)


def router(service: Service) -> APIRouter:
    """The routes of the server's own API."""
    routes = APIRouter(tags=["sdkd"])

    @routes.get("/api/about")
    async def about() -> dict[str, Any]:
        """Models with their targets, ranges and defaults, schedulers, LoRAs, limits."""
        return _about(service)

    @routes.post("/api/images", response_model=None)
    async def images(asked: ImageRequest, request: Request) -> Response:
        """Draw images: an answer with all of them, or with `stream` server-sent events."""
        wanted = wanted_of(asked, service)
        if asked.stream:
            job = await service.submit(wanted, "native")
            return StreamingResponse(
                _stream(service, job), media_type="text/event-stream", headers={"cache-control": "no-store"}
            )
        result = await answered(service, request, wanted, "native")
        made = [await _image(service, drawn) for drawn in result.images]
        return JSONResponse({"images": made, "timing": asdict(result.timing)})

    @routes.delete("/api/images/{request_id}", status_code=204)
    async def cancel(request_id: str) -> None:
        """Take a request back."""
        if not service.cancel(request_id):
            raise UnknownNameError(f"request {request_id!r} is over, or not known here")

    @routes.post("/api/png-info")
    async def png_info(asked: PngRequest) -> dict[str, Any]:
        """The settings that a PNG carries, from its `parameters` where it was drawn elsewhere."""
        data = from_base64(asked.png, "png", service.limits)
        fields = await asyncio.to_thread(text_in, data, "png", service.limits)
        parameters = fields.pop(PARAMETERS, "")
        return {"settings": fields if "seed" in fields else read(parameters), "parameters": parameters}

    @routes.get("/health")
    async def health() -> Response:
        """Whether requests are taken, and which models are loaded."""
        state = {"status": "stopping" if service.stopping else "ok", "loaded": service.loaded()}
        return JSONResponse(state, 503 if service.stopping else 200)

    @routes.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """What was counted, for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return routes


def _about(service: Service) -> dict[str, Any]:
    loaded = service.loaded()
    return {
        "version": __version__,
        "models": [_served(one) | {"loaded": one.id in loaded} for one in service.catalog.all],
        "schedulers": list(SCHEDULERS),
        "loras": list(service.loras),
        "limits": asdict(service.limits),
        "auth": service.has_key,
    }


def _served(one: Served) -> dict[str, Any]:
    height, width = one.size
    run = one.generation
    return {
        "id": one.id,
        "name": one.name,
        "target": one.target,
        "default": one.default,
        "width": width,
        "height": height,
        "multiple": one.multiple,
        "ranges": [_ranges(ranges) for ranges in one.ranges],
        "steps": run.steps,
        "guidance_scale": run.guidance_scale,
        "scheduler": run.scheduler,
        "own_scheduler": one.own_scheduler,
        "takes": list(one.takes),
        "few_steps": run.few_steps,
        "negative_prompt": not one.embedded_guidance,
    }


def _ranges(ranges: ShapeRanges) -> dict[str, Any]:
    return {name: value for name, value in ranges.to_json().items() if name != "sequence"}


async def _image(service: Service, drawn: Drawn) -> dict[str, Any]:
    data = base64.b64encode(await service.image_bytes(drawn)).decode()
    known = {name: getattr(drawn, name) for name in ("index", "seed", "width", "height", "settings", "notes")}
    return {**known, "png": data, "timing": asdict(drawn.timing)}


async def _stream(service: Service, job: Job) -> AsyncGenerator[bytes]:
    """Server-sent events of a job; it is cancelled when nobody reads them any more."""
    try:
        async with contextlib.aclosing(job.events()) as events:
            async for event in events:
                service.watch(job)
                yield f"event: {event.kind}\ndata: {json.dumps(await _data(service, event))}\n\n".encode()
    finally:
        service.cancel(job.id)


async def _data(service: Service, event: Event) -> dict[str, Any]:
    if event.kind == "image":
        return await _image(service, event.data)
    if event.kind == "error":
        return dict(answer(event.data)["error"])  # type: ignore[call-overload]
    found: dict[str, Any] = dict(event.data)
    if preview := found.get("preview"):
        found["preview"] = f"data:image/png;base64,{base64.b64encode(preview).decode()}"
    return found
