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
from pydantic_core import to_json

from sdkd import __version__
from sdkd.core.profiles import ShapeRanges
from sdkd.models.schedulers import SCHEDULERS
from sdkd.serve.api.fields import Direct, body_of, validated, values_of
from sdkd.serve.api.native_fields import ImageRequest, PngRequest, wanted_of
from sdkd.serve.caption import PARAMETERS
from sdkd.serve.catalog import Served
from sdkd.serve.encoding import text_in
from sdkd.serve.errors import UnknownNameError, answer
from sdkd.serve.jobs import Drawn, Event, Job, Result
from sdkd.serve.parameters import read
from sdkd.serve.uploads import from_base64
from sdkd.serve.wanted import Wanted

if TYPE_CHECKING:
    from sdkd.serve.service import Service


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

    async def images(request: Request) -> Response:
        """Draw images: an answer with all of them, or with `stream` server-sent events."""
        asked = validated(ImageRequest, await values_of(request))
        wanted = wanted_of(asked, service.limits)
        if asked.stream:
            job = await service.submit(wanted, "native")
            return StreamingResponse(
                _stream(service, job), media_type="text/event-stream", headers={"cache-control": "no-store"}
            )
        result = await answered(service, request, wanted, "native")
        made = [await _image(service, drawn) for drawn in result.images]
        # of megabytes of base64: json would look at each letter
        found = to_json({"images": made, "timing": result.timing.to_json()})
        return Response(found, media_type="application/json")

    routes.add_api_route(
        "/api/images", images, methods=["POST"], openapi_extra=body_of(ImageRequest), route_class_override=Direct
    )

    @routes.delete("/api/images/{request_id}", status_code=204)
    async def cancel(request_id: str) -> None:
        """Take a request back."""
        if not service.cancel(request_id):
            raise UnknownNameError(f"request {request_id!r} is over, or not known here")

    @routes.post("/api/png-info", openapi_extra=body_of(PngRequest))
    async def png_info(request: Request) -> dict[str, Any]:
        """The settings that a PNG carries, from its `parameters` where it was drawn elsewhere."""
        asked = validated(PngRequest, await values_of(request))
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
    known = {name: getattr(drawn, name) for name in ("index", "seed", "width", "height", "notes")}
    return {**known, "settings": drawn.caption.settings, "png": data, "timing": drawn.timing.to_json()}


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
