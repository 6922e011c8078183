"""The application: a service behind its APIs and its page, for any ASGI server."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
from collections.abc import AsyncIterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from sdkd import __version__
from sdkd.bundle.memory import GB, free_gpu_memory, free_memory
from sdkd.core import processes
from sdkd.core.numbers import Bounds, check_numbers
from sdkd.errors import InputError, SdkdError
from sdkd.models.schedulers import scheduler_class
from sdkd.serve.api import native, openai, webui
from sdkd.serve.api.fields import problems
from sdkd.serve.catalog import Catalog, make_catalog
from sdkd.serve.errors import UnknownNameError, answer, status_of
from sdkd.serve.fleet import check_fits
from sdkd.serve.guard import Guard, Trust
from sdkd.serve.service import Service
from sdkd.serve.wanted import Limits
from sdkd.serve.workers import PRELOAD

log = logging.getLogger(__name__)
SHARE = 0.8  # of the memory that is free at the start
KINDS = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
POLICY = "default-src 'self'; img-src 'self' data: blob:; style-src 'self'; script-src 'self'; frame-ancestors 'none'"


def create_app(
    models: Sequence[str] | Catalog,
    *,
    target: str | None = None,
    lora_dir: Path | str | None = None,
    output: Path | str | None = None,
    memory_gb: float | None = None,
    limits: Limits | None = None,
    trust: Trust | None = None,
    preload: bool = True,
) -> FastAPI:
    """The application of a server: `app.state.service` is its Service, once it runs.

    `models`: as `sdkd serve` takes them. `memory_gb`: what all loaded models may take together, 80 % of the free memory
    by default. `trust`: whom it answers; by default requests to local names from its own page. `preload`: whether the
    first model is loaded before it is asked for. Raises what `make_catalog` raises, and InputError for models that do
    not fit, a folder of LoRAs that is none, or an output that is a file.
    """
    check_numbers({"memory_gb": memory_gb}, {"memory_gb": Bounds(above=0)})
    catalog = models if isinstance(models, Catalog) else make_catalog(models, target)
    folders = {"lora_dir": lora_dir, "output": output}
    loras, written = (None if folder is None else Path(folder) for folder in folders.values())
    if loras is not None and not loras.is_dir():
        raise InputError(f"LoRA folder {str(loras)!r} is no folder: give one with .safetensors files")
    if written is not None and written.exists() and not written.is_dir():
        raise InputError(f"output {str(written)!r} is a file: give a folder")
    memory = _memory(catalog, memory_gb)
    check_fits(catalog, memory)
    limits, trust = limits or Limits(), trust or Trust()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        processes.prepare(PRELOAD)
        loading = asyncio.create_task(_load_first(service)) if preload else None
        await asyncio.to_thread(scheduler_class, "ddim")  # the libraries that requests are checked with
        gc.freeze()  # they stay: nothing for the collector
        try:
            yield
        finally:
            if loading is not None:
                loading.cancel()
            await service.close()

    service = Service(catalog, limits, memory, loras, written, has_key=trust.key is not None)
    app = FastAPI(title="sdkd serve", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    for routes in (native, openai, webui):
        app.include_router(routes.router(service))
    _add_page(app)
    _add_errors(app)
    _describe_errors(app)
    app.add_middleware(Guard, trust=trust, limits=limits)
    if trust.origins:  # outermost: browsers ask before they send, without a key
        app.add_middleware(
            CORSMiddleware, allow_origins=sorted(trust.origins), allow_methods=["*"], allow_headers=["*"]
        )
    return app


async def _load_first(service: Service) -> None:
    try:
        await service.load()
    except Exception as error:  # noqa: BLE001 - the first request says it again, to somebody
        log.warning("model %s could not be loaded: %s", service.catalog.default.id, error)


def _memory(catalog: Catalog, memory_gb: float | None) -> dict[str, int]:
    free = {"cpu": free_memory, "cuda": free_gpu_memory}
    places = {served.place for served in catalog.all}
    return {place: int(SHARE * free[place]()) if memory_gb is None else int(memory_gb * GB) for place in places}


def _add_page(app: FastAPI) -> None:
    folder = files("sdkd.serve") / "page"

    @functools.cache
    def content(name: str) -> bytes:
        return (folder / name).read_bytes()

    names = {file.name for file in folder.iterdir() if file.name.rsplit(".")[-1] in KINDS}

    def respond(name: str) -> Response:
        headers = {"content-security-policy": POLICY, "x-content-type-options": "nosniff", "cache-control": "no-cache"}
        return Response(content(name), media_type=KINDS[name.rsplit(".")[-1]], headers=headers)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return respond("index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return respond("docs.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        if name not in names:
            raise UnknownNameError(f"the page has no file {name!r}")
        return respond(name)


def _add_errors(app: FastAPI) -> None:
    """One form of answer for everything that goes wrong."""

    async def failed(request: Request, error: Exception) -> Response:
        status = status_of(error)
        if status >= 500:
            log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return JSONResponse(answer(error), status)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return JSONResponse(answer(InputError(problems(error.errors()))), 400)

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        words = str(error.detail)
        if error.status_code in (404, 405):
            words = f"{request.method} {request.url.path} is not known here ({words}): see /docs"
        return JSONResponse(answer(InputError(words), error.status_code), error.status_code, error.headers)

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(SdkdError, failed)
    app.add_exception_handler(Exception, failed)


def _describe_errors(app: FastAPI) -> None:
    """Have the description of the API say what errors are answered, in the place of FastAPI's own kind."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        schema = described()
        known = {"message": {"type": "string"}, "type": {"type": "string"}, "code": {"type": "integer"}}
        form = {"type": "object", "properties": {"error": {"type": "object", "properties": known}}}
        refused = {"description": "What is wrong, and what to do", "content": {"application/json": {"schema": form}}}
        for operation in (one for path in schema["paths"].values() for one in path.values()):
            operation["responses"].pop("422", None)
            operation["responses"].setdefault("default", refused)
        for name in ("HTTPValidationError", "ValidationError"):
            schema.get("components", {}).get("schemas", {}).pop(name, None)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
