"""Pipelines that look at images are compared on drawn ones: the same picture, mask and edges for every subject."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engines.image_inputs import EDIT, SEEING, TEXT, WAYS, Inputs, Way, as_pipeline, with_defaults

if TYPE_CHECKING:
    from PIL.Image import Image

EDIT_CHANNELS = 8  # of an instruct-pix2pix UNet


def way_of(pipe: Any) -> Way:
    """The pipeline of diffusers that a model is for, by what its UNet takes and whether it has a ControlNet."""
    channels = int(pipe.unet.config.in_channels)
    if channels == EDIT_CHANNELS:
        return EDIT
    seen = SEEING[channels][1][0] if channels in SEEING else frozenset[str]()
    return WAYS[seen | {"control"} if getattr(pipe, "controlnet", None) is not None else seen]


def as_drawn(pipe: Any) -> Any:
    """The pipeline in the class that its model is for; text-to-image stays as it is, whatever its class."""
    way = way_of(pipe)
    return pipe if way is TEXT else as_pipeline(pipe, way.pipeline)


def guidance_copies(pipe: Any) -> int:
    """Latents per image in a guided UNet call: instruct-pix2pix has one more condition, the image."""
    return 3 if int(pipe.unet.config.in_channels) == EDIT_CHANNELS else 2


def inputs_for(way: Way, side: int, steps: int) -> Inputs:
    """The drawn images that a pipeline takes, `side` pixels wide and high, and its scales' defaults."""
    drawn = {"image": picture, "mask": mask, "control": edges}
    images = {name: drawn[name](side) for name in sorted(set(way.images.values()))}
    return with_defaults(Inputs(images=images), way, steps)


def picture(side: int) -> Image:
    """A red disc on a field that goes from blue to yellow, RGB."""
    from PIL import Image, ImageDraw

    across, down = Image.linear_gradient("L").rotate(90).resize((side, side)), Image.linear_gradient("L")
    field = Image.merge("RGB", (across, down.resize((side, side)), across.point(lambda value: 255 - value)))
    ImageDraw.Draw(field).ellipse(_middle(side), fill=(220, 40, 40))
    return field


def mask(side: int) -> Image:
    """White, drawn anew, in the middle; mode L."""
    from PIL import Image, ImageDraw

    field = Image.new("L", (side, side), 0)
    ImageDraw.Draw(field).rectangle(_middle(side), fill=255)
    return field


def edges(side: int) -> Image:
    """The outline of the picture's disc, white on black, as edge detectors give it, RGB."""
    from PIL import Image, ImageDraw

    field = Image.new("RGB", (side, side), "black")
    ImageDraw.Draw(field).ellipse(_middle(side), outline="white", width=max(1, side // 64))
    return field


def _middle(side: int) -> tuple[int, int, int, int]:
    return side // 4, side // 4, side - side // 4 - 1, side - side // 4 - 1


def note(name: str, way: Way) -> str | None:
    """What a report says of a model's inputs; None for text-to-image."""
    if way is TEXT:
        return None
    names = {"control": "the outline of a disc for its ControlNet", "image": "a drawn picture", "mask": "a mask"}
    given = " and ".join(names[each] for each in ("image", "mask", "control") if each in way.images.values())
    return f"{name} was given {given}, the same for every subject"
