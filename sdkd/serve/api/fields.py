"""Fields of a request's body: checked against a model, each problem in words of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from sdkd.errors import InputError
from sdkd.serve.api.native import ImageRequest

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


def validated(kind: type[Fields], values: Mapping[str, object], *, strict: bool = True) -> Fields:
    """The fields as a model; InputError, which names everything that is wrong at once.

    `strict`: a text is no number, as in JSON; not in forms, where everything is text.
    """
    try:
        return kind.model_validate(dict(values), strict=strict)
    except ValidationError as error:
        problems = [_problem(one) for one in error.errors(include_url=False)]
        raise InputError("; ".join(problems)) from error


def _problem(error: ErrorDetails) -> str:
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
