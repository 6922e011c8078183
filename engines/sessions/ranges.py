"""Whether a call fits an engine: its tensors the contract, its sizes what was built; else the command to cover it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdkd.core.components import guidance_copies
from sdkd.core.contract import Contract, TensorSpec, size_multiple, split_axis
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.errors import EngineError, RangeError

if TYPE_CHECKING:
    import torch

    from engines.sessions.checks import Checked
    from sdkd.bundle.manifest import Bundle, EngineRecord

_HEIGHTS = ("height", "image_height")
_WIDTHS = ("width", "image_width")
_AXES = ("batch", "height", "width", "sequence")

Signature = tuple[tuple[str, "torch.dtype", Sequence[int]], ...]
"""Name, dtype and shape of every tensor of a call: all that tells whether it fits."""


@dataclass(frozen=True)
class Fit:
    """A call that an engine takes: its sizes in words, its optimization profile, and its outputs."""

    asked: str
    profile: int
    outputs: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


def signature(feeds: Mapping[str, torch.Tensor]) -> Signature:
    """What `fit` asks of a call's tensors."""
    return tuple((name, tensor.dtype, tensor.shape) for name, tensor in feeds.items())


def fit(checked: Checked, given: Signature) -> Fit:
    """What a call is to an engine. EngineError names a tensor that does not fit the contract; RangeError as below."""
    contract, shapes = checked.contract, {name: shape for name, _, shape in given}
    wanted, dtypes = [spec.name for spec in contract.inputs], {name: dtype for name, dtype, _ in given}
    if set(shapes) != set(wanted):
        raise EngineError(f"{checked.label} takes {', '.join(wanted)}, not {', '.join(shapes) or 'nothing'}")
    for spec in contract.inputs:
        check_tensor(checked.label, spec, dtypes[spec.name], shapes[spec.name])
    sizes = sizes_of(contract, shapes)
    profile = check_sizes(checked, sizes)
    every = output_sizes(contract, sizes, checked.scale)
    outputs = tuple((spec.name, spec.shape(every), spec.torch_dtype) for spec in contract.outputs)
    return Fit(", ".join(f"{axis} {count}" for axis, count in sizes.items()) or "its fixed sizes", profile, outputs)


def parts(checked: Checked, given: Signature, limit: int | None = None) -> int:
    """In how many calls a batch runs, of at most `limit` rows: as few as what was built for the other sizes allows."""
    shapes = {name: shape for name, _, shape in given}
    # Of all profiles when none holds the other sizes: `fit` says so.
    built = checked.profiles.largest_batch(sizes_of(checked.contract, shapes)) or checked.limits["batch"].max
    return -(-shapes[checked.contract.batched[0]][0] // min(built, limit or built))


def check_tensor(label: str, spec: TensorSpec, dtype: torch.dtype, shape: Sequence[int]) -> None:
    """EngineError unless dtype, rank and fixed axes are those of an input."""
    if dtype != spec.torch_dtype:
        raise EngineError(f"input {spec.name!r} is {dtype}, {label} takes {spec.dtype}")
    same_rank = len(shape) == len(spec.axes)
    if not same_rank or any(
        isinstance(axis, int) and axis != size for axis, size in zip(spec.axes, shape, strict=True)
    ):
        wanted = ", ".join(str(axis) for axis in spec.axes)
        fixed = ": its shapes were fixed by --static, export the model again without it"
        raise EngineError(
            f"input {spec.name!r} has shape {tuple(shape)}, {label} takes ({wanted})"
            f"{fixed if same_rank and not spec.dynamic_axes else ''}"
        )


def check_sizes(checked: Checked, sizes: Mapping[str, int]) -> int:
    """The profile for a call of these sizes; RangeError unless one holds every axis, a multiple of its step each."""
    for axis, step in checked.steps.items():
        if sizes[axis] % step:
            factor = 1 if axis.startswith("image_") else checked.scale
            pixels, multiple = sizes[axis] * factor, step * factor
            low = max(multiple, pixels // multiple * multiple)
            raise RangeError(
                f"{axis.removeprefix('image_')} {pixels} is not a multiple of {multiple} pixels, as {checked.label} "
                f"needs: use {low} or {low + multiple}"
            )
    if (profile := checked.profiles.pick(sizes)) is not None:
        return profile
    _check_image(checked, sizes)
    if "images" in sizes and sizes["images"] not in (most := checked.limits["images"]):
        raise RangeError(
            f"{checked.label} takes {most.min} to {most.max} images of an IP-Adapter, not {sizes['images']}: give fewer"
        )
    words = _built_for(checked.bundle, checked.record, asked_ranges(checked, sizes))
    raise RangeError(f"{checked.label} was asked for {_describe(checked, sizes)}, {words}")


def check_images(bundle: Bundle, record: EngineRecord, batch: int, size: tuple[int, int] | None) -> None:
    """RangeError unless one profile of an engine holds so many images a call, of this height and width (None: any).

    Said of the record alone, before the engine is opened.
    """
    asked = {"batch": batch} | dict(zip(("height", "width"), size or (), strict=False))
    if any(all(value in getattr(profile, name) for name, value in asked.items()) for profile in record.profiles):
        return
    words = ", ".join(f"{name} {value}{'' if name == 'batch' else ' px'}" for name, value in asked.items())
    raise RangeError(
        f"the {record.slot} engine of {record.component} in {str(bundle.path)!r} was asked for {words}, "
        f"{_built_for(bundle, record, asked)}"
    )


def _built_for(bundle: Bundle, record: EngineRecord, asked: Mapping[str, int]) -> str:
    built = " and for ".join(str(profile) for profile in record.profiles)
    return (
        f"and was built for {built}. Build one that covers {'all' if len(record.profiles) > 1 else 'both'} with: "
        f"{cover_command(bundle, record, asked)}"
    )


def _check_image(checked: Checked, sizes: Mapping[str, int]) -> None:
    """RangeError for an image that no engine can be built for: a VAE takes sizes that the model's UNet does not."""
    bundle = checked.bundle
    if not checked.contract.component.startswith("vae") or not (bundle.path / "unet" / "config.json").is_file():
        return
    multiple = size_multiple(bundle.config("unet"), bundle.vae_config())
    asked = asked_ranges(checked, sizes)
    wrong = [name for name in ("height", "width") if asked[name] % multiple]
    if wrong:
        near = [max(multiple, round(asked[name] / multiple) * multiple) for name in ("height", "width")]
        raise RangeError(
            f"an image of {asked['height']}x{asked['width']} px (height x width) does not fit: {wrong[0]} "
            f"{asked[wrong[0]]} is not a multiple of {multiple} pixels, as this model needs: resize it, to "
            f"{near[0]}x{near[1]} px for one"
        )


def sizes_of(contract: Contract, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Size of each dynamic axis of the inputs, from their shapes; EngineError when two inputs differ in one."""
    sizes: dict[str, int] = {}
    for spec in contract.inputs:
        for position, axis in spec.dynamic_axes.items():
            size = shapes[spec.name][position]
            if sizes.setdefault(axis, size) != size:
                raise EngineError(f"input {spec.name!r} has {axis} {size}, another input has {sizes[axis]}")
    return sizes


def output_sizes(contract: Contract, sizes: Mapping[str, int], scale: int) -> dict[str, int]:
    """Sizes of the outputs' axes, those of the inputs included: pixels from latents, latents from pixels, halves."""
    every = dict(sizes)
    for axis in ("height", "width"):
        if axis in sizes:
            every[f"image_{axis}"] = sizes[axis] * scale
        elif f"image_{axis}" in sizes:
            every[axis] = sizes[f"image_{axis}"] // scale
    # TensorSpec.shape works out the likes of `height * 8` by itself.
    axes = {axis for spec in contract.outputs for axis in spec.dynamic_axes.values() if " " not in axis}
    return every | {axis: every[root] // by for axis in axes for root, by in [split_axis(axis)]}


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

    return ShapeRanges(*(wide(name) for name in _AXES))


def cover_command(bundle: Bundle, record: EngineRecord, asked: Mapping[str, int]) -> str:
    """The `sdkd build-engine` command whose engine covers what was built and the request.

    One profile is widened; beside several, the request becomes one more.
    """
    command, built = bundle.build_command(record.slot), record.profiles
    if len(built) > 1:
        exactly = ShapeRanges(
            *(Range.fixed(asked[name]) if name in asked else getattr(built[0], name) for name in _AXES)
        )
        texts = (",".join(f"{key}={value}" for key, value in one.options().items()) for one in (*built, exactly))
        return command + "".join(f' --profile "{text}"' for text in texts)
    options = widened(built[0], asked).options()
    return command + "".join(f" --{key} {options[key]}" for key in options if key != "tokens" or "sequence" in asked)


def _describe(checked: Checked, sizes: Mapping[str, int]) -> str:
    asked = asked_ranges(checked, sizes)
    guided = f" ({sizes['batch']} with guidance)" if guidance_copies(checked.contract) > 1 else ""
    units = {"batch": guided, "height": " px", "width": " px", "sequence": ""}
    words = {"sequence": "tokens"}
    return ", ".join(f"{words.get(name, name)} {value}{units[name]}" for name, value in asked.items())
