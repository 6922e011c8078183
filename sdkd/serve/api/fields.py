"""The body of a request: read, checked against a model, and described for OpenAPI."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from sdkd.errors import InputError
from sdkd.serve.api.native_fields import ImageRequest

Fields = TypeVar("Fields", bound=BaseModel)
_SHOWN = 60  # characters of a value that is not usable
# What fields mean that the server's own API has under another name, or not at all.
_MEANS = {
    "size": "WIDTHxHEIGHT in pixels, or auto.",
    "response_format": "b64_json, or url: kept in memory for a while.",
    "output_format": "png, jpeg or webp.",
    "output_compression": "Quality of jpeg and webp, 0 to 100.",
    "cfg_scale": "Guidance scale; 1 or less: no guidance.",
    "sampler_name": "A name of /sdapi/v1/samplers.",
    "batch_size": "Images of the request, times n_iter.",
    "n_iter": "Images of the request, times batch_size.",
    "init_images": "The image to start from, in base64; one.",
    "denoising_strength": "How much of the image to change, 0 to 1.",
    "override_settings": "sd_model_checkpoint for this request alone.",
    "name": "Its file's name in the server's folder, without the ending.",
}


class Direct(APIRoute):
    """A route that FastAPI only describes: its endpoint reads the request and answers by itself, which is faster."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The endpoint."""
        return self.endpoint


async def values_of(request: Request) -> dict[str, Any]:
    """The fields of a request in JSON, as yet unchecked; InputError where it holds something else."""
    body = await request.body()  # in any case: clients that still send do not hear an answer
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):  # pages of others send anything else unasked
        raise InputError(f"a request of type {kind!r} is not read: send JSON, with Content-Type: application/json")
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the request is not JSON ({error}): send an object of fields") from error
    if not isinstance(values, dict):
        raise InputError(f"the request holds a {type(values).__name__}, not an object of fields: see /docs")
    return values


def validated(kind: type[Fields], values: Mapping[str, object], *, strict: bool = True) -> Fields:
    """The fields as a model; InputError, which names everything that is wrong at once.

    `strict`: a text is no number, as in JSON; not in forms, where everything is text.
    """
    try:
        return kind.model_validate(dict(values), strict=strict)
    except ValidationError as error:
        raise InputError(problems(error.errors(include_url=False))) from error


def problems(errors: Sequence[Mapping[str, Any]]) -> str:
    """What pydantic found wrong, in words."""
    return "; ".join(_problem(one) for one in errors)


def _problem(error: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{name} is missing: send it"
    if error["type"] == "extra_forbidden":
        return f"{name!r} is not a field that this server knows: leave it out"
    value = repr(error["input"])
    shown = value if len(value) <= _SHOWN else f"{value[:_SHOWN]}..."
    return f"{name} {shown} is not usable: {error['msg'][:1].lower()}{error['msg'][1:]}"


def body_of(kind: type[BaseModel], form: str = "application/json", files: tuple[str, ...] = ()) -> dict[str, Any]:
    """The body of a request as OpenAPI describes it, for routes that validate theirs themselves.

    `files`: fields of a form that are files.
    """
    schema = kind.model_json_schema()
    schema = _inlined(schema, schema.pop("$defs", {}))
    means = {name: field.description for name, field in ImageRequest.model_fields.items()} | _MEANS
    for name, about in schema["properties"].items():
        about.setdefault("description", means.get(name) or "")
    for name in files:
        schema["properties"][name] = {"type": "string", "format": "binary", "description": means.get(name) or ""}
    return {"requestBody": {"required": True, "content": {form: {"schema": schema}}}}


def _inlined(part: Any, definitions: Mapping[str, Any]) -> Any:
    """A schema with what it refers to in the place of the references, which OpenAPI looks for elsewhere."""
    if isinstance(part, list):
        return [_inlined(one, definitions) for one in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        return _inlined(definitions[part["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(value, definitions) for key, value in part.items()}
