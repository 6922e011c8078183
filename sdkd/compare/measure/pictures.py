"""Pipelines that look at images are compared on drawn ones: the same picture, mask and edges for every subject."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engines.generate.image_inputs import SEEING, TEXT, Inputs, PipelineKind, as_pipeline, kind_for, with_defaults

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]
"""Height and width in pixels."""


def kind_of(pipe: Any) -> PipelineKind:
    """The pipeline of diffusers that a model is for, by what its UNet takes and whether it has a ControlNet."""
    channels = int(pipe.unet.config.in_channels)
    seen = SEEING[channels][1][0] if channels in SEEING else frozenset[str]()
    return kind_for(channels, seen | {"control"} if getattr(pipe, "controlnet", None) is not None else seen)


def as_drawn(pipe: Any) -> Any:
    """The pipeline in the class that its model is for; text-to-image stays as it is, whatever its class."""
    kind = kind_of(pipe)
    return pipe if kind is TEXT else as_pipeline(pipe, kind.pipeline)


def inputs_for(kind: PipelineKind, size: Size, steps: int) -> Inputs:
    """The drawn images that a pipeline takes, in the size to draw, and its scales' defaults."""
    drawn = {"image": picture, "mask": mask, "control": edges}
    images = {name: drawn[name](size) for name in sorted(set(kind.images.values()))}
    return with_defaults(Inputs(images=images), kind, steps)


def picture(size: Size) -> Image:
    """A red disc on a field that goes from blue to yellow, RGB."""
    from PIL import Image, ImageDraw

    gradient, wide = Image.linear_gradient("L"), size[::-1]
    across, down = gradient.rotate(90).resize(wide), gradient.resize(wide)
    field = Image.merge("RGB", (across, down, across.point(lambda value: 255 - value)))
    ImageDraw.Draw(field).ellipse(_middle(size), fill=(220, 40, 40))
    return field


def mask(size: Size) -> Image:
    """White, which is drawn again, in the middle; mode L."""
    from PIL import Image, ImageDraw

    field = Image.new("L", size[::-1], 0)
    ImageDraw.Draw(field).rectangle(_middle(size), fill=255)
    return field


def edges(size: Size) -> Image:
    """The outline of the picture's disc, white on black, as edge detectors give it, RGB."""
    from PIL import Image, ImageDraw

    field = Image.new("RGB", size[::-1], "black")
    ImageDraw.Draw(field).ellipse(_middle(size), outline="white", width=max(1, min(size) // 64))
    return field


def _middle(size: Size) -> tuple[int, int, int, int]:
    height, width = size
    return width // 4, height // 4, width - width // 4 - 1, height - height // 4 - 1


def note(name: str, kind: PipelineKind) -> str | None:
    """What a report says of a model's inputs; None for text-to-image."""
    if kind is TEXT:
        return None
    names = {"control": "the outline of a disc for its ControlNet", "image": "a drawn picture", "mask": "a mask"}
    given = " and ".join(names[each] for each in ("image", "mask", "control") if each in kind.images.values())
    return f"{name} was given {given}, the same for every subject"
