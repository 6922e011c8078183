"""The API of AUTOMATIC1111's web UI, /sdapi/v1, for the programs that are made for it.

It draws from prompts, images and masks, tells progress, and lists models, samplers and LoRAs. What a request leaves out
is the model's own: its steps, size, guidance scale and scheduler. Fields for things that are not done here are accepted
with the values that mean "off", and refused by name with any other (sdkd.serve.api.webui_fields). Weights in prompts,
such as (word:1.2), are read as plain text. `eta` 1, which clients send with every request, is each sampler's own.

`options` has the model of this API: setting `sd_model_checkpoint` changes it, for this API alone. Sampling ends with
`interrupt` at the next step, and the requests that ran are answered with an error.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

import psutil
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict

from sdkd import __version__
from sdkd.core.numbers import DRAWING, check_numbers
from sdkd.errors import InputError, MissingExtraError
from sdkd.models.schedulers import SCHEDULERS, scheduler_class
from sdkd.serve.api.fields import body_of, validated, values_of
from sdkd.serve.api.native import answered
from sdkd.serve.api.webui_fields import ImageFields, TextFields, read_fields
from sdkd.serve.api.webui_inpainting import Inpainting, inpainting
from sdkd.serve.caption import PARAMETERS
from sdkd.serve.encoding import text_in
from sdkd.serve.jobs import Drawn, Job
from sdkd.serve.parameters import SAMPLERS, parse, sampler_name, write
from sdkd.serve.uploads import from_base64
from sdkd.serve.wanted import Wanted

if TYPE_CHECKING:
    from sdkd.serve.service import Service

API = "webui"
_MODEL = "sd_model_checkpoint"  # A1111's name of it among options
# What clients ask for when they start, and what there is none of here.
_LISTS = (
    *("upscalers", "latent-upscale-modes", "sd-vae", "hypernetworks", "face-restorers"),
    *("realesrgan-models", "prompt-styles", "script-info", "extensions"),
)
_NOTHING: dict[str, Any] = {
    **{name: [] for name in _LISTS},
    "embeddings": {"loaded": {}, "skipped": {}},
    "scripts": {"txt2img": [], "img2img": []},
    "cmd-flags": {},
}
_OURS = {"prompt", "seed", "target"}  # text fields that tell an image of ours: other programs have a `prompt`, too
_AUTOMATIC = {"name": "automatic", "label": "Automatic", "aliases": None, "default_rho": -1, "need_inner_model": False}


class PngInfoRequest(BaseModel):
    """An image file to read the settings of, in base64."""

    model_config = ConfigDict(extra="forbid")

    image: str


def router(service: Service) -> APIRouter:
    """The routes of a server."""
    api = _Api(service)
    made = APIRouter(prefix="/sdapi/v1", tags=["A1111"])
    posts = (api.txt2img, TextFields), (api.img2img, ImageFields), (api.png_info, PngInfoRequest)
    for route, fields in posts:
        path = f"/{route.__name__.replace('_', '-')}"
        made.add_api_route(path, route, methods=["POST"], openapi_extra=body_of(fields))
    made.add_api_route("/interrupt", api.interrupt, methods=["POST"])
    made.add_api_route("/options", api.set_options, methods=["POST"])
    for name in ("refresh-checkpoints", "refresh-loras"):  # nothing to do: LoRAs are looked up whenever they are used
        made.add_api_route(f"/{name}", _always(None), methods=["POST"], name=name)
    for name in ("options", "sd_models", "samplers", "schedulers", "loras", "progress", "memory"):
        made.add_api_route(f"/{name.replace('_', '-')}", getattr(api, name), methods=["GET"])
    for name, answer in _NOTHING.items():
        made.add_api_route(f"/{name}", _always(answer), methods=["GET"], name=name)
    return made


def _always(answer: Any) -> Any:
    async def route() -> Any:
        return answer

    return route


class _Api:
    def __init__(self, service: Service) -> None:
        self.service = service
        self.model = service.catalog.default.id

    async def txt2img(self, request: Request) -> dict[str, Any]:
        """Draw images from a prompt."""
        values = await values_of(request)
        fields = read_fields(TextFields, values)
        return await self._answer(request, fields, fields.wanted(self._model(fields)), None, values)

    async def img2img(self, request: Request) -> dict[str, Any]:
        """Draw an image, or the white areas of its mask, again."""
        values = await values_of(request)
        fields = read_fields(ImageFields, values)
        model, limits = self._model(fields), self.service.limits
        wanted = replace(fields.wanted(model), strength=fields.denoising_strength)
        image = from_base64(fields.init_images[0], "init_images", limits)
        inside, mask = None, None
        if fields.mask:
            mask = from_base64(fields.mask, "mask", limits)
            inside = await asyncio.to_thread(self._inpainting, image, mask, fields, model)
            image, mask = await asyncio.to_thread(inside.inputs)
        wanted = replace(wanted, image=image, mask=mask)
        shown = values if fields.include_init_images else {**values, "init_images": None, "mask": None}
        return await self._answer(request, fields, wanted, inside, shown)

    def _inpainting(self, image: bytes, mask: bytes, fields: ImageFields, model: str) -> Inpainting:
        check_numbers({"width": fields.width, "height": fields.height}, DRAWING)
        height, width = self.service.catalog.find(model).size
        one = fields.width or fields.height  # alone, it is that of a square
        return inpainting(
            image,
            mask,
            self.service.limits,
            size=(fields.width or one or width, fields.height or one or height),
            blur=fields.blur,
            inverted=bool(fields.inpainting_mask_invert),
            fills=fields.inpainting_fill == 0,
            only_masked=bool(fields.inpaint_full_res),
            padding=fields.inpaint_full_res_padding,
        )

    async def _answer(
        self, request: Request, fields: TextFields, wanted: Wanted, inside: Inpainting | None, shown: Mapping[str, Any]
    ) -> dict[str, Any]:
        result = await answered(self.service, request, wanted, API)
        images = [await asyncio.to_thread(inside.onto, one) if inside else one for one in result.images]
        files = await asyncio.gather(*(self.service.image_bytes(one) for one in images if fields.send_images))
        return {
            "images": [base64.b64encode(file).decode() for file in files],
            "parameters": dict(shown),
            "info": json.dumps(_info(images, fields), ensure_ascii=False),
        }

    # Options

    def options(self) -> dict[str, Any]:
        """The model, and what is always so."""
        return {
            _MODEL: self.model,
            "sd_checkpoint_hash": None,
            "sd_vae": "Automatic",
            "CLIP_stop_at_last_layers": 1,
            "eta_noise_seed_delta": 0,
            "samples_format": "png",
            "enable_pnginfo": True,
        }

    async def set_options(self, request: Request) -> None:
        """Change the model of this API; other options may be sent as they are."""
        self.model = self._model_of(await values_of(request), "option")

    def _model(self, fields: TextFields) -> str:
        return self._model_of(fields.override_settings or {}, "override_settings")

    def _model_of(self, values: Mapping[str, Any], what: str) -> str:
        """The model that options ask for; InputError for other options that would have to change."""
        now = self.options()
        for name, value in values.items():
            if name != _MODEL and (name not in now or value != now[name]):
                raise InputError(f"{what} {name} cannot be set to {value!r:.80}: set {_MODEL} alone")
        name = values.get(_MODEL) or self.model
        if not isinstance(name, str):
            raise InputError(f"{what} {_MODEL} {name!r:.80} is no text: give a title of /sdapi/v1/sd-models")
        return self.service.catalog.find(name).id

    # Lists

    def sd_models(self) -> list[dict[str, Any]]:
        """All models, each on every target; the title is the id."""
        known = {"hash": None, "sha256": None, "config": None}
        models = self.service.catalog.all
        return [{"title": one.id, "model_name": one.name, "filename": one.id} | known for one in models]

    def samplers(self) -> list[dict[str, Any]]:
        """A1111's names of the schedulers, and ours where it has none; those that can be used here."""
        names = SAMPLERS | {own: own for own in SCHEDULERS if own not in SAMPLERS.values()}
        return [_sampler(label, name) for label, name in names.items() if _usable(name)]

    def schedulers(self) -> list[dict[str, Any]]:
        """Noise schedules: the model's own alone."""
        return [_AUTOMATIC]

    def loras(self) -> list[dict[str, Any]]:
        """LoRAs, to be asked for as `<lora:NAME:STRENGTH>`."""
        return [
            {"name": name, "alias": name, "path": f"{name}.safetensors", "metadata": {}} for name in self.service.loras
        ]

    def memory(self) -> dict[str, Any]:
        """Memory of the machine, bytes."""
        ram = psutil.virtual_memory()
        return {
            "ram": {"free": ram.available, "used": ram.total - ram.available, "total": ram.total},
            "cuda": {"error": "not read by this server"},
        }

    # What runs

    async def progress(self, skip_current_image: bool = False) -> dict[str, Any]:
        """How far the request of this API is that is drawn now, with a small picture of it from the second call on."""
        jobs = self.service.current(API)
        job = next((one for one in jobs if one.state == "running"), None)
        if job is not None and not skip_current_image:
            self.service.watch(job)
        preview = None if job is None or skip_current_image else job.preview
        return {
            "progress": job.fraction if job is not None else 0.0,
            "eta_relative": (job.eta_s if job is not None else None) or 0.0,
            "state": _state(job, sum(one.order.n for one in jobs if one is not job)),
            "current_image": None if preview is None else base64.b64encode(preview).decode(),
            "textinfo": None,
        }

    async def interrupt(self) -> dict[str, Any]:
        """End what is drawn for this API at its next step."""
        for job in self.service.current(API):
            if job.state == "running":
                self.service.cancel(job.id)
        return {}

    async def png_info(self, request: Request) -> dict[str, Any]:
        """The settings in an image: A1111's text, its fields, and the image's other text fields."""
        data = from_base64(validated(PngInfoRequest, await values_of(request)).image, "image", self.service.limits)
        items = await asyncio.to_thread(text_in, data, "image", self.service.limits)
        text = items.pop(PARAMETERS, "") or (write(items) if items.keys() >= _OURS else "")
        return {"info": text, "items": items, "parameters": parse(text) if text else {}}


def _usable(scheduler: str) -> bool:
    try:
        scheduler_class(scheduler)
    except MissingExtraError:
        return False
    return True


def _sampler(label: str, name: str) -> dict[str, Any]:
    kind = SCHEDULERS.get(name, name)
    return {"name": label, "aliases": [one for one in dict.fromkeys((name, kind)) if one != label], "options": {}}


def _state(job: Job | None, waiting: int) -> dict[str, Any]:
    count = len(job.items) if job is not None else 0
    each = job.steps // count if job is not None and count else 0
    number = min(job.step // each, count - 1) if job is not None and each else 0
    begun = datetime.fromtimestamp(job.created) if job is not None else None
    return {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": job.id if job is not None else "",
        "job_count": count + waiting,
        "job_timestamp": begun.strftime("%Y%m%d%H%M%S") if begun else "0",
        "job_no": number,
        "sampling_step": job.step - number * each if job is not None else 0,
        "sampling_steps": each,
    }


def _info(images: list[Drawn], fields: TextFields) -> dict[str, Any]:
    """What A1111 says about the images that it drew."""
    first, settings = images[0], images[0].caption.settings
    count, negative = len(images), settings.get("negative_prompt", "")
    strength = settings.get("strength")
    return {
        "prompt": settings["prompt"],
        "all_prompts": [settings["prompt"]] * count,
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * count,
        "seed": first.seed,
        "all_seeds": [one.seed for one in images],
        "subseed": -1,
        "all_subseeds": [-1] * count,
        "subseed_strength": 0,
        "width": first.width,
        "height": first.height,
        "sampler_name": sampler_name(settings["scheduler"]),
        "cfg_scale": float(settings["guidance_scale"]),
        "steps": int(settings["steps"]),
        "batch_size": fields.batch_size or 1,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": settings["model"],
        "sd_model_hash": None,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": None if strength is None else float(strength),
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [one.caption.parameters for one in images],
        "styles": [],
        "job_timestamp": datetime.now().strftime("%Y%m%d%H%M%S"),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
        "version": f"sdkd {__version__}",
        "comments": [note for one in images for note in one.notes],
    }
