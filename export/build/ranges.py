"""Shape ranges of a bundle: defaults, what is typed on the command line, and the input shapes that a builder needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sdkd.bundle.manifest import Bundle
from sdkd.core.contract import Contract, check_size, native_size, size_multiple, split_axis
from sdkd.core.files import read_json
from sdkd.core.profiles import Range, ShapeRanges, Shapes, axis_ranges, profile_shapes
from sdkd.errors import BundleError, InputError

BATCH = Range(1, 1, 4)


def bundle_multiple(bundle: Bundle) -> int:
    """Pixels that image sizes of this bundle must be a multiple of."""
    return size_multiple(bundle.config("unet"), bundle.vae_config())


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


def fixed_ranges(bundle: Bundle) -> ShapeRanges | None:
    """The one shape of a bundle that was exported with fixed shapes; None for any other."""
    found = [record.details.get("static") for record in bundle.manifest.components.values()]
    return next((ShapeRanges.from_json(one) for one in found if one), None)


def default_ranges(bundle: Bundle) -> ShapeRanges:
    """One to four images of the native size, best for one; prompts of the text encoder's full length.

    Of a bundle with fixed shapes, those.
    """
    if fixed := fixed_ranges(bundle):
        return fixed
    if (size := native_size(bundle.config("unet"), bundle.vae_config())) is None:
        raise BundleError(f"bundle {str(bundle.path)!r}: unet/config.json has no sample_size: export the model again")
    height, width = size
    return ShapeRanges(BATCH, Range.fixed(height), Range.fixed(width), Range.fixed(max_tokens(bundle)))


@dataclass(frozen=True)
class Typed:
    """One profile as it is typed: `512`, `512..1024`, `512x768` (height x width), `1..4`; what is empty is default.

    Several sizes become one range that covers them all, best for the first.
    """

    sizes: tuple[str, ...] = ()
    size_opt: str | None = None
    batch: str | None = None
    batch_opt: str | None = None
    tokens: str | None = None

    def pixels(self) -> tuple[Range, Range] | None:
        """Ranges of height and width; None when no size was typed; InputError when a text is not understood."""
        pairs = [_parse_size(text) for text in self.sizes]
        if not pairs:
            return None
        best = _parse_size(self.size_opt) if self.size_opt else (None, None)
        height, width = (_cover([pair[side] for pair in pairs]) for side in (0, 1))
        return _best(height, best[0], "--size-opt", "height"), _best(width, best[1], "--size-opt", "width")

    def images(self) -> Range | None:
        """Range of images per call; None when none was typed."""
        best = Range.parse(self.batch_opt) if self.batch_opt else None
        return _best(Range.parse(self.batch), best, "--batch-opt", "batch") if self.batch else None

    def prompt(self) -> Range | None:
        """Range of tokens per prompt; None when none was typed."""
        return Range.parse(self.tokens) if self.tokens else None

    def check(self) -> None:
        """InputError for whatever is wrong without a look at the model."""
        self.pixels(), self.images(), self.prompt()
        for option, of, value, given in (
            ("--size-opt", "--size", self.size_opt, self.sizes),
            ("--batch-opt", "--batch", self.batch_opt, self.batch),
        ):
            if value and not given:
                raise InputError(f"{option} {value} is the best of a range: give the range too, with {of}")


def _best(r: Range, best: Range | None, option: str, what: str) -> Range:
    """The range with another optimum, which it must hold."""
    if best is None:
        return r
    if best.min != best.max or best.opt not in r:
        raise InputError(
            f"{option} {best} is not one {what} within {r}: the best size must lie inside the profile, "
            f"for example {option} {r.max}"
        )
    return Range(r.min, best.opt, r.max)


PROFILE_KEYS = {"size": "sizes", "size-opt": "size_opt", "batch": "batch", "batch-opt": "batch_opt", "tokens": "tokens"}
PROFILE_EXAMPLE = '--profile "size=512..1024,size-opt=768,batch=1..4"'


def parse_profile(text: str, outside: Typed = Typed()) -> Typed:
    """Read `size=512,batch=1..4`; what a profile leaves out is taken from `outside`; InputError with an example."""
    given: dict[str, Any] = {}
    for part in text.split(","):
        key, _, value = (word.strip() for word in part.partition("="))
        if key not in PROFILE_KEYS or not value or PROFILE_KEYS[key] in given:
            raise InputError(
                f"profile {text!r} is not understood at {part.strip()!r}: give each of {', '.join(PROFILE_KEYS)} "
                f"at most once, as in {PROFILE_EXAMPLE}"
            )
        given[PROFILE_KEYS[key]] = (value,) if key == "size" else value
    # A best size belongs to the range beside it.
    if "sizes" in given:
        given.setdefault("size_opt", None)
    if "batch" in given:
        given.setdefault("batch_opt", None)
    return replace(outside, **given)


def parse_profiles(texts: Sequence[str], outside: Typed, bundle: Bundle) -> tuple[ShapeRanges, ...]:
    """The profiles of `--profile` texts, each once, or the one that the options outside describe; all checked."""
    typed = [parse_profile(text, outside) for text in texts] or [outside]
    return tuple(dict.fromkeys(to_ranges(one, bundle) for one in typed))


def to_ranges(typed: Typed, bundle: Bundle) -> ShapeRanges:
    """Checked ranges; what was not typed comes from `default_ranges`. Raises InputError with the value and the rule."""
    typed.check()
    default = default_ranges(bundle)
    height, width = typed.pixels() or (default.height, default.width)
    ranges = ShapeRanges(typed.images() or default.batch, height, width, typed.prompt() or default.sequence)
    check_ranges(ranges, bundle)
    return ranges


def cover(profiles: Sequence[ShapeRanges]) -> ShapeRanges:
    """The smallest ranges that hold all profiles, best for the first's best."""
    names = ("batch", "height", "width", "sequence")
    return ShapeRanges(*(_cover([getattr(profile, name) for profile in profiles]) for name in names))


def _parse_size(text: str) -> tuple[Range, Range]:
    parts = text.lower().split("x")
    if len(parts) > 2:
        raise InputError(f"size {text!r} is not understood: give 512, 512..768 or 512x768 (height x width)")
    height = Range.parse(parts[0])
    return height, Range.parse(parts[-1])


def _cover(ranges: Sequence[Range]) -> Range:
    return Range(min(r.min for r in ranges), ranges[0].opt, max(r.max for r in ranges))


def check_ranges(ranges: ShapeRanges, bundle: Bundle) -> None:
    """InputError unless every size fits the UNet's levels and the prompt fits the text encoder, or the fixed shapes."""
    if (fixed := fixed_ranges(bundle)) and ranges != fixed:
        raise InputError(
            f"bundle {str(bundle.path)!r} was exported for fixed shapes, {fixed}, and not for {ranges}: "
            f"leave the shapes out, or export it again without --static"
        )
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
    """Turns ranges of images, pixels and tokens into axis sizes: pixels per latent, tokens per text encoder call."""

    scale: int
    multiple: int  # of pixels
    positions: int | None = None

    @staticmethod
    def of(bundle: Bundle) -> Geometry:
        """A bundle's own; BundleError when its configs do not say."""
        return Geometry(bundle.scale(), bundle_multiple(bundle), bundle.positions())

    def axes(self, contract: Contract, ranges: ShapeRanges) -> dict[str, Range]:
        """Range of each dynamic axis of a component."""
        return axis_ranges(contract, ranges, self.scale, self.positions)


def input_shapes(contract: Contract, ranges: ShapeRanges, geometry: Geometry) -> dict[str, Shapes]:
    """Smallest, best and largest shape of every input of a component, in the contract's order."""
    return profile_shapes(contract, geometry.axes(contract, ranges))


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


def check_shapes(contract: Contract, profiles: Sequence[ShapeRanges], geometry: Geometry) -> tuple[dict[str, int], ...]:
    """Axis sizes at which an engine is compared with its graph: each profile's best, and one more of the first."""
    second = other_sizes(contract, profiles[0], geometry)
    rest = [best_sizes(contract, profile, geometry) for profile in profiles[1:]]
    found = [best_sizes(contract, profiles[0], geometry), *([second] if second else []), *rest]
    return tuple(sizes for index, sizes in enumerate(found) if sizes not in found[:index])
