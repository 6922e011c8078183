"""Whether a request lies inside what an engine was built for, and the command that would cover it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sdkd.contract import Range, ShapeRanges, guidance_copies
from sdkd.errors import RangeError

if TYPE_CHECKING:
    from engines.session import Checked

_HEIGHTS = ("height", "image_height")
_WIDTHS = ("width", "image_width")


def check_sizes(checked: Checked, sizes: Mapping[str, int]) -> None:
    """RangeError unless every axis lies in its built range and is a multiple of its step."""
    for axis, step in checked.steps.items():
        if sizes[axis] % step:
            factor = 1 if axis.startswith("image_") else checked.scale
            pixels, multiple = sizes[axis] * factor, step * factor
            low = max(multiple, pixels // multiple * multiple)
            raise RangeError(
                f"{axis.removeprefix('image_')} {pixels} is not a multiple of {multiple} pixels, as {checked.label} "
                f"needs: use {low} or {low + multiple}"
            )
    if all(size in checked.limits[axis] for axis, size in sizes.items()):
        return
    asked = asked_ranges(checked, sizes)
    raise RangeError(
        f"{checked.label} was asked for {_describe(checked, sizes)}, and was built for {checked.record.ranges}. "
        f"Build one that covers both with: {cover_command(checked, asked)}"
    )


def output_sizes(sizes: Mapping[str, int], scale: int) -> dict[str, int]:
    """The axes that outputs have and inputs have not: pixels from latents, latents from pixels."""
    if "height" in sizes:
        return {f"image_{axis}": sizes[axis] * scale for axis in ("height", "width")}
    return {axis: sizes[f"image_{axis}"] // scale for axis in ("height", "width") if f"image_{axis}" in sizes}


def asked_ranges(checked: Checked, sizes: Mapping[str, int]) -> dict[str, int]:
    """The request as a user counts it: images, pixels, tokens. A UNet's batch holds both halves of guidance."""
    images = -(-sizes["batch"] // guidance_copies(checked.contract))
    asked = {"batch": images}
    for name, axes in (("height", _HEIGHTS), ("width", _WIDTHS), ("sequence", ("sequence",))):
        for axis in axes:
            if axis in sizes:
                asked[name] = sizes[axis] * (checked.scale if axis in ("height", "width") else 1)
    return asked


def widened(ranges: ShapeRanges, asked: Mapping[str, int]) -> ShapeRanges:
    """The smallest ranges that hold both; the optimum stays."""

    def wide(name: str) -> Range:
        built: Range = getattr(ranges, name)
        size = asked.get(name, built.opt)
        return Range(min(built.min, size), built.opt, max(built.max, size))

    return ShapeRanges(*(wide(name) for name in ("batch", "height", "width", "sequence")))


def cover_command(checked: Checked, asked: Mapping[str, int]) -> str:
    """The `sdkd build-engine` command whose engine covers the built ranges and the request."""
    wide = widened(checked.record.ranges, asked)
    height, width = _option(wide.height), _option(wide.width)
    size = height if height == width else f"{height}x{width}"
    tokens = f" --tokens {_option(wide.sequence)}" if "sequence" in asked else ""
    batch = f" --batch {_option(wide.batch)}"
    return f"sdkd build-engine {checked.bundle.path} --target {checked.record.slot} --size {size}{batch}{tokens}"


def _describe(checked: Checked, sizes: Mapping[str, int]) -> str:
    asked = asked_ranges(checked, sizes)
    guided = f" ({sizes['batch']} with guidance)" if guidance_copies(checked.contract) > 1 else ""
    units = {"batch": guided, "height": " px", "width": " px", "sequence": ""}
    words = {"sequence": "tokens"}
    return ", ".join(f"{words.get(name, name)} {value}{units[name]}" for name, value in asked.items())


def _option(r: Range) -> str:
    """A range as `sdkd build-engine` reads it back."""
    return str(r) if r.opt == r.min else f"{r.min}..{r.opt}..{r.max}"
