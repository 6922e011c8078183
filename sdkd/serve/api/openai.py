"""OpenAI's image API: /v1/images/generations, /v1/images/edits, /v1/models.

Beside OpenAI's fields a request may have `steps`, `seed`, `negative_prompt`, `guidance_scale`, `scheduler`, `strength`
and `loras` (a list of {name, strength}; in a form, the same as JSON, or as OpenAI's client sends it). OpenAI's own
model names, which clients send by default, mean the server's first model where no model has them. `quality`, `style`,
`moderation` and `user` are accepted where they ask for nothing that could be done, every other field is refused.

A mask of OpenAI's is transparent where the image is drawn again. Without one, all of the image is, as far as `strength`
says. Images given as `url` are kept in memory, the newest of them, and are gone when the server ends.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import secrets
import time
from collections import OrderedDict
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import FormData, UploadFile

from sdkd.errors import InputError
from sdkd.serve.api.fields import body_of, validated, values_of
from sdkd.serve.api.native import answered
from sdkd.serve.api.native_fields import LoraField
from sdkd.serve.catalog import Catalog
from sdkd.serve.encoding import MEDIA_TYPES
from sdkd.serve.errors import UnknownNameError
from sdkd.serve.jobs import Drawn, Result
from sdkd.serve.service import Service
from sdkd.serve.uploads import from_upload, mask_of_transparency
from sdkd.serve.wanted import LoraWish, Wanted

KEPT_IMAGES, KEPT_BYTES = 256, 64 * 1024 * 1024  # of images that are answered as `url`
QUALITY = 90  # of JPEG and WebP
_OWN = ("dall-e-", "gpt-image-", "chatgpt-image-")  # how the names of OpenAI's models begin
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
_FILES = ("image", "image[]", "mask")  # of a form; the client sends several images as image[]
_LORA_NAMES, _LORA_STRENGTHS = "loras[][name]", "loras[][strength]"  # how the client sends a list in a form


class Images(BaseModel):
    """The fields of both requests."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    model: str | None = None
    n: int | None = None
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(None, ge=0, le=100)
    # ours
    steps: int | None = None
    seed: int | None = None
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    strength: float | None = None
    loras: list[LoraField] | None = None
    # what asks for nothing
    user: str | None = None
    safety_identifier: str | None = None
    quality: Literal["auto", "standard"] | None = None
    style: Literal["vivid", "natural"] | None = None
    moderation: Literal["auto", "low"] | None = None
    background: Literal["auto", "opaque"] | None = None
    stream: bool | None = None
    partial_images: int | None = None

    def wanted(self, catalog: Catalog, image: bytes | None = None, mask: bytes | None = None) -> Wanted:
        """The request of all APIs; InputError for a size that is none, and for what would be answered in parts."""
        for name in ("stream", "partial_images"):
            if value := getattr(self, name):
                raise InputError(
                    f"{name} {value} is not possible: leave it out, or use POST /api/images, which streams"
                )
        width, height = _size(self.size)
        return Wanted(
            prompt=self.prompt,
            model=_model(self.model, catalog),
            negative_prompt=self.negative_prompt,
            width=width,
            height=height,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            scheduler=self.scheduler,
            seed=self.seed,
            n=1 if self.n is None else self.n,
            loras=tuple(LoraWish(lora.name, lora.strength) for lora in self.loras or ()),
            strength=self.strength,
            image=image,
            mask=mask,
        )

    @property
    def format(self) -> str:
        """Of the image files."""
        return self.output_format or "png"


def _size(size: str | None) -> tuple[int | None, int | None]:
    if size in (None, "auto"):
        return None, None
    if (match := _SIZE.fullmatch(size or "")) is None:
        raise InputError(f"size {size!r} is not usable: give WIDTHxHEIGHT in pixels, such as 512x768, or auto")
    return int(match[1]), int(match[2])


def _model(name: str | None, catalog: Catalog) -> str | None:
    served = name in {one.id for one in catalog.all}
    return None if name is None or (name.startswith(_OWN) and not served) else name


class Kept:
    """The newest images that were answered as an address, by names that nobody can guess."""

    def __init__(self, images: int = KEPT_IMAGES, size: int = KEPT_BYTES) -> None:
        self._most, self._size = images, size
        self._files: OrderedDict[str, bytes] = OrderedDict()

    def add(self, data: bytes, ending: str) -> str:
        """Keep a file and give its name; the oldest ones go, but never the new one."""
        name = f"{secrets.token_urlsafe(24)}.{ending}"
        self._files[name] = data
        while len(self._files) > self._most or (self._bytes > self._size and len(self._files) > 1):
            self._files.popitem(last=False)
        return name

    @property
    def _bytes(self) -> int:
        return sum(len(data) for data in self._files.values())

    def get(self, name: str) -> bytes:
        """A file; UnknownNameError when it is not, or no longer, there."""
        if name not in self._files:
            raise UnknownNameError(f"image {name!r} is not, or no longer, kept: draw it again, or ask for b64_json")
        return self._files[name]


def router(service: Service) -> APIRouter:
    """The routes of a server."""
    api = _Api(service)
    made = APIRouter(tags=["OpenAI"])
    form = body_of(Images, "multipart/form-data", ("image", "mask"))
    made.add_api_route("/v1/images/generations", api.generate, methods=["POST"], openapi_extra=body_of(Images))
    made.add_api_route("/v1/images/edits", api.edit, methods=["POST"], openapi_extra=form)
    made.add_api_route("/v1/models", api.models, methods=["GET"])
    made.add_api_route("/v1/models/{name}", api.model, methods=["GET"])
    made.add_api_route("/files/{name}", api.file, methods=["GET"], name="openai_file")
    return made


class _Api:
    def __init__(self, service: Service) -> None:
        self.service, self.kept = service, Kept()
        self.started = int(time.time())

    async def generate(self, request: Request) -> dict[str, Any]:
        """Draw images from a prompt."""
        fields = validated(Images, await values_of(request))
        return await self._answer(request, fields, fields.wanted(self.service.catalog))

    async def edit(self, request: Request) -> dict[str, Any]:
        """Draw an image, or the transparent areas of its mask, again; a form (multipart/form-data)."""
        limits = self.service.limits
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise InputError("images are sent as a form: send multipart/form-data, with image as a file")
        async with request.form() as form:
            fields = validated(Images, _texts(form), strict=False)
            image = await from_upload(_one_file(form, "image", "image[]"), "image", limits)
            mask = await from_upload(_one_file(form, "mask"), "mask", limits) if "mask" in form else None
        if mask is not None:
            mask = await asyncio.to_thread(mask_of_transparency, mask, "mask", limits)
        return await self._answer(request, fields, fields.wanted(self.service.catalog, image, mask))

    async def _answer(self, request: Request, fields: Images, wanted: Wanted) -> dict[str, Any]:
        if fields.format == "png" and fields.output_compression not in (None, 100):
            raise InputError(
                f"output_compression {fields.output_compression} has nothing to act on, a PNG loses nothing: ask for "
                "output_format jpeg or webp, or leave it out"
            )
        result = await answered(self.service, request, wanted, "openai")
        first = result.images[0]
        return {
            "created": int(time.time()),
            "background": "opaque",
            "output_format": fields.format,
            "size": f"{first.width}x{first.height}",
            "data": await self._data(request, fields, result),
        }

    async def _data(self, request: Request, fields: Images, result: Result) -> list[dict[str, Any]]:
        quality = QUALITY if fields.output_compression is None else fields.output_compression
        files = await asyncio.gather(
            *(self.service.image_bytes(drawn, fields.format, quality) for drawn in result.images)
        )
        if fields.response_format == "url":
            names = [self.kept.add(data, fields.format) for data in files]
            shown = [{"url": str(request.url_for("openai_file", name=name))} for name in names]
        else:
            shown = [{"b64_json": base64.b64encode(data).decode()} for data in files]
        return [one | _about(drawn) for one, drawn in zip(shown, result.images, strict=True)]

    def models(self) -> dict[str, Any]:
        """All models, each on every target."""
        return {"object": "list", "data": [self._model(one.id) for one in self.service.catalog.all]}

    def model(self, name: str) -> dict[str, Any]:
        """One model."""
        return self._model(self.service.catalog.find(name).id)

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.started, "owned_by": "sdkd"}

    def file(self, name: str) -> Response:
        """An image that was answered as `url`."""
        headers = {"Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}
        return Response(self.kept.get(name), media_type=MEDIA_TYPES[name.rpartition(".")[2]], headers=headers)


def _about(drawn: Drawn) -> dict[str, Any]:
    """What OpenAI has no field for: the seed, and what of the prompt was not read."""
    return {"seed": drawn.seed} | ({"notes": list(drawn.notes)} if drawn.notes else {})


def _texts(form: FormData) -> dict[str, Any]:
    """The fields of a form but its files. InputError for one that is there twice, and for LoRAs that are no list."""
    found: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name in _FILES or name in (_LORA_NAMES, _LORA_STRENGTHS):
            continue
        if isinstance(value, UploadFile):
            raise InputError(f"file {name!r} is not one that this server knows: send image, and mask")
        if name in found:
            raise InputError(f"{name} is there twice: send it once")
        found[name] = value
    if names := form.getlist(_LORA_NAMES):
        strengths = form.getlist(_LORA_STRENGTHS) or ["1"] * len(names)
        if len(strengths) != len(names):
            raise InputError(f"loras has {len(names)} names and {len(strengths)} strengths: give each its strength")
        pairs = zip(names, strengths, strict=True)
        found["loras"] = [{"name": name, "strength": strength} for name, strength in pairs]
    elif "loras" in found:
        try:
            found["loras"] = json.loads(found["loras"])
        except ValueError as error:
            raise InputError(f"loras is not JSON ({error}): send a list of {{name, strength}}") from error
    return found


def _one_file(form: FormData, *names: str) -> UploadFile:
    files = [value for name in names for value in form.getlist(name)]
    if len(files) != 1 or not isinstance(files[0], UploadFile):
        raise InputError(f"{names[0]} was sent {len(files)} times, or not as a file: send one image file")
    return files[0]
