"""What a request of the server's own API may ask for."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from sdkd.serve.uploads import from_base64
from sdkd.serve.wanted import Limits, LoraWish, Wanted


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


def wanted_of(asked: ImageRequest, limits: Limits) -> Wanted:
    """A request as data; InputError for base64 that is none."""

    def file(name: str) -> bytes | None:
        text = getattr(asked, name)
        return None if text is None else from_base64(text, name, limits)

    plain = {name: value for name, value in asked if name not in ("stream", "loras", "image", "mask")}
    loras = tuple(LoraWish(one.name, one.strength) for one in asked.loras)
    return Wanted(**plain, loras=loras, image=file("image"), mask=file("mask"))
