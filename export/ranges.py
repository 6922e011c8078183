"""Shape ranges of a bundle: sensible defaults, what people type, and the input shapes that a builder needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdkd.bundle import Bundle
from sdkd.contract import Contract, Range, ShapeRanges, axis_ranges, check_size, size_multiple, split_axis, vae_scale
from sdkd.errors import BundleError, InputError
from sdkd.files import read_json

BATCH = Range(1, 1, 4)
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, best and largest shape of one input."""


def vae_config(bundle: Bundle) -> dict[str, object]:
    """The AutoencoderKL config of a bundle, from whichever half was exported; BundleError without one."""
    halves = [name for name in ("vae_decoder", "vae_encoder") if (bundle.path / name / "config.json").is_file()]
    return bundle.config(halves[0] if halves else "vae_decoder")


def bundle_scale(bundle: Bundle) -> int:
    """Pixels per latent of the bundle's VAE."""
    return vae_scale(vae_config(bundle))


def bundle_multiple(bundle: Bundle) -> int:
    """Pixels that image sizes of this bundle must be a multiple of."""
    return size_multiple(bundle.config("unet"), vae_config(bundle))


def max_tokens(bundle: Bundle) -> int:
    """Tokens per prompt that the text encoder has positions for; BundleError when the bundle does not say."""
    if (positions := bundle.positions()) is not None:
        return positions
    tokenizer = bundle.path / "tokenizer" / "tokenizer_config.json"
    if tokenizer.is_file():
        return int(read_json(tokenizer)["model_max_length"])
    raise BundleError(
        f"bundle {str(bundle.path)!r} has neither text_encoder/config.json nor tokenizer/tokenizer_config.json, "
        f"so the prompt length is unknown: export it again, or pass ranges"
    )


def native_size(bundle: Bundle) -> tuple[int, int]:
    """Height and width in pixels that the UNet was trained for: its `sample_size` times the VAE's scale."""
    sample = bundle.config("unet")["sample_size"]
    height, width = sample if isinstance(sample, Sequence) else (sample, sample)
    return int(height) * bundle_scale(bundle), int(width) * bundle_scale(bundle)


def default_ranges(bundle: Bundle) -> ShapeRanges:
    """One to four images of the native size, best for one; prompts of the text encoder's full length."""
    height, width = native_size(bundle)
    return ShapeRanges(BATCH, Range.fixed(height), Range.fixed(width), Range.fixed(max_tokens(bundle)))


def parse_ranges(sizes: Sequence[str], batch: str | None, sequence: str | None, bundle: Bundle) -> ShapeRanges:
    """Read `512`, `512..768`, `512x768` (height x width) and `1..4` into checked ranges.

    Several sizes become one range that covers them all, best for the first. What is not given comes from
    `default_ranges`. Raises InputError with the value and the rule.
    """
    default = default_ranges(bundle)
    height, width = parse_sizes(sizes) or (default.height, default.width)
    tokens = Range.parse(sequence) if sequence else default.sequence
    ranges = ShapeRanges(Range.parse(batch) if batch else default.batch, height, width, tokens)
    check_ranges(ranges, bundle)
    return ranges


def parse_sizes(sizes: Sequence[str]) -> tuple[Range, Range] | None:
    """Ranges of height and width that cover all sizes, best for the first; None for no size."""
    pairs = [_parse_size(text) for text in sizes]
    return (_cover([height for height, _ in pairs]), _cover([width for _, width in pairs])) if pairs else None


def _parse_size(text: str) -> tuple[Range, Range]:
    parts = text.lower().split("x")
    if len(parts) > 2:
        raise InputError(f"size {text!r} is not understood: give 512, 512..768 or 512x768 (height x width)")
    height = Range.parse(parts[0])
    return height, Range.parse(parts[-1])


def _cover(ranges: Sequence[Range]) -> Range:
    return Range(min(r.min for r in ranges), ranges[0].opt, max(r.max for r in ranges))


def check_ranges(ranges: ShapeRanges, bundle: Bundle) -> None:
    """InputError unless every size fits the UNet's levels and the prompt fits the text encoder."""
    check_sizes(ranges.height, ranges.width, bundle_multiple(bundle))
    tokens = max_tokens(bundle)
    parts = -(-ranges.sequence.max // tokens)
    if parts > 1 and any(size % tokens for size in (ranges.sequence.opt, ranges.sequence.max)):
        raise InputError(
            f"{ranges.sequence} tokens: this text encoder has {tokens} positions, and longer prompts are encoded in "
            f"parts of {tokens}: give a multiple, such as --tokens {tokens}..{parts * tokens}"
        )


def check_sizes(height: Range, width: Range, multiple: int) -> None:
    """InputError unless smallest, best and largest height and width are multiples of `multiple` pixels."""
    for name in ("min", "opt", "max"):
        check_size(getattr(height, name), getattr(width, name), multiple)


@dataclass(frozen=True)
class Geometry:
    """What turns ranges as people think of them into axis sizes: pixels per latent, tokens per text encoder call."""

    scale: int
    multiple: int  # of pixels
    positions: int | None = None

    @staticmethod
    def of(bundle: Bundle) -> Geometry:
        """A bundle's own; BundleError when its configs do not say."""
        return Geometry(bundle_scale(bundle), bundle_multiple(bundle), bundle.positions())

    def axes(self, contract: Contract, ranges: ShapeRanges) -> dict[str, Range]:
        """Range of each dynamic axis of a component."""
        return axis_ranges(contract, ranges, self.scale, self.positions)


def input_shapes(contract: Contract, ranges: ShapeRanges, geometry: Geometry) -> dict[str, Shapes]:
    """Smallest, best and largest shape of every input of a component, in the contract's order."""
    axes = geometry.axes(contract, ranges)

    def corner(name: str) -> dict[str, int]:
        return {axis: getattr(r, name) for axis, r in axes.items()}

    low, best, high = corner("min"), corner("opt"), corner("max")
    return {spec.name: (spec.shape(low), spec.shape(best), spec.shape(high)) for spec in contract.inputs}


def other_sizes(contract: Contract, ranges: ShapeRanges, geometry: Geometry) -> dict[str, int] | None:
    """Sizes of the nearest shape that differs from the best one in every ranged axis; None when all is fixed."""
    pixels, latents = geometry.multiple, geometry.multiple // geometry.scale
    steps = {"height": latents, "width": latents, "image_height": pixels, "image_width": pixels}
    axes = geometry.axes(contract, ranges)

    def neighbour(axis: str) -> int:
        root, divisor = split_axis(axis)
        return _neighbour(axes[root], steps.get(root, 1)) // divisor

    sizes = {axis: neighbour(axis) for axis in axes}
    return sizes if any(sizes[axis] != axes[axis].opt for axis in axes) else None


def _neighbour(r: Range, step: int) -> int:
    return next((value for value in (r.opt - step, r.opt + step) if value in r), r.opt)


def best_sizes(contract: Contract, ranges: ShapeRanges, geometry: Geometry) -> dict[str, int]:
    """Axis sizes of the best shape."""
    return {axis: r.opt for axis, r in geometry.axes(contract, ranges).items()}
