"""Ranges of sizes that an engine is built for: TensorRT's optimization profile, in pixels and tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from sdkd.core.components import TEXT_ENCODERS, guidance_copies
from sdkd.core.contract import Contract, TensorSpec, split_axis
from sdkd.core.numbers import check_number
from sdkd.errors import InputError

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, best and largest shape of one input."""
IMAGES = (1, 1, 8)  # of an IP-Adapter in one call: fewest, usual, most
_LARGEST = 1 << 20  # pixels, tokens or images


@dataclass(frozen=True)
class Range:
    """Smallest, best and largest size of one axis (TensorRT's min, opt, max)."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        for size in (self.min, self.opt, self.max):
            check_number("size", size, high=_LARGEST, whole=True)
        if not 1 <= self.min <= self.opt <= self.max:
            raise InputError(f"range {self.min}..{self.opt}..{self.max} is not ordered: give 1 <= min <= opt <= max")

    def __contains__(self, value: int) -> bool:
        return self.min <= value <= self.max

    def __str__(self) -> str:
        return str(self.min) if self.min == self.max else f"{self.min}..{self.max}"

    def option(self) -> str:
        """As `parse` reads it back, the best size included."""
        return str(self) if self.opt == self.min else f"{self.min}..{self.opt}..{self.max}"

    @staticmethod
    def fixed(value: int) -> Range:
        """A static axis."""
        return Range(value, value, value)

    @staticmethod
    def parse(text: str) -> Range:
        """Read `512`, `512..768` (opt = min) or `512..640..768`; InputError names the text and the forms."""
        if not re.fullmatch(r"\d{1,9}(\.\.\d{1,9}){0,2}", text.strip()):
            raise InputError(f"range {text!r} is not understood: give 512, 512..768 or min..opt..max")
        numbers = [int(part) for part in text.strip().split("..")]
        low, high = numbers[0], numbers[-1]
        return Range(low, numbers[1] if len(numbers) == 3 else low, high)


def parse_size(text: str) -> tuple[int, int]:
    """Read `512` or `512x768` as (height, width) in pixels; InputError names the text and the forms."""
    if not re.fullmatch(r"\d{1,9}(x\d{1,9})?", text.strip()):
        raise InputError(f"size {text!r} is not understood: give pixels as 512, or height x width as 512x768")
    height, _, width = text.strip().partition("x")
    return int(height), int(width or height)


@dataclass(frozen=True)
class ShapeRanges:
    """One optimization profile: images per call, image size in pixels, tokens per prompt."""

    batch: Range
    height: Range
    width: Range
    sequence: Range
    JSON = dict[str, tuple[int, int, int]]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary of `[min, opt, max]` lists."""
        return {name: [r["min"], r["opt"], r["max"]] for name, r in asdict(self).items()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ShapeRanges:
        """The inverse of `to_json`."""
        return ShapeRanges(**{name: Range(*data[name]) for name in ("batch", "height", "width", "sequence")})

    def options(self) -> dict[str, str]:
        """As `sdkd build-engine` reads them back: its options `size`, `batch` and `tokens`."""
        height, width = self.height.option(), self.width.option()
        size = height if height == width else f"{height}x{width}"
        return {"size": size, "batch": self.batch.option(), "tokens": self.sequence.option()}

    def __str__(self) -> str:
        return f"batch {self.batch}, height {self.height} px, width {self.width} px, {self.sequence} tokens"


def axis_ranges(contract: Contract, ranges: ShapeRanges, scale: int, positions: int | None = None) -> dict[str, Range]:
    """Range of each dynamic axis of a component's inputs.

    The UNet's batch covers every copy that guidance stacks, and fewer, since guidance can be off. `scale`: pixels per
    latent. `positions`: how many tokens the text encoder can take at once; longer prompts reach the UNet as several
    of its outputs, one after the other.
    """

    def over(r: Range, divisor: int) -> Range:
        return Range(r.min // divisor, r.opt // divisor, r.max // divisor)

    copies = guidance_copies(contract)
    longest = positions if positions and contract.component in TEXT_ENCODERS else ranges.sequence.max
    whole = {
        "batch": Range(ranges.batch.min, copies * ranges.batch.opt, copies * ranges.batch.max),
        "sequence": Range(*(min(size, longest) for size in (ranges.sequence.min, ranges.sequence.opt, longest))),
        "height": over(ranges.height, scale),
        "width": over(ranges.width, scale),
        "image_height": ranges.height,
        "image_width": ranges.width,
        "images": Range(*IMAGES),
    }
    return {axis: over(whole[root], by) for axis in contract.axis_names() for root, by in [split_axis(axis)]}


def profile_shapes(contract: Contract, axes: Mapping[str, Range]) -> dict[str, Shapes]:
    """Smallest, best and largest shape of every input, in the contract's order, from ranges of its axes."""
    low, best, high = ({axis: getattr(r, end) for axis, r in axes.items()} for end in ("min", "opt", "max"))
    return {spec.name: (spec.shape(low), spec.shape(best), spec.shape(high)) for spec in contract.inputs}


def static_contract(contract: Contract, ranges: ShapeRanges, scale: int, positions: int | None = None) -> Contract:
    """The contract with every axis fixed at its best size; `scale` and `positions` as in `axis_ranges`."""
    sizes = {axis: r.opt for axis, r in axis_ranges(contract, ranges, scale, positions).items()}
    # Outputs can have pixels where inputs have latents, and the other way round.
    pixels = {f"image_{axis}": sizes[axis] * scale for axis in ("height", "width") if axis in sizes}
    latents = {axis: sizes[f"image_{axis}"] // scale for axis in ("height", "width") if f"image_{axis}" in sizes}
    every = pixels | latents | sizes

    def fixed(spec: TensorSpec) -> TensorSpec:
        return replace(spec, axes=spec.shape(every))

    return Contract(contract.component, tuple(map(fixed, contract.inputs)), tuple(map(fixed, contract.outputs)))
