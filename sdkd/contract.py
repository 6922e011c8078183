"""What each component looks like from outside: tensor names, named axes, dtypes and shape ranges.

Export, parity, build and run time all derive from this one declaration. Names follow Optimum's ONNX layout.
Axis letters: batch, sequence (tokens), height and width (latents), image_height and image_width (pixels).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sdkd.errors import InputError, ModelError

Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
DTYPES: dict[Precision, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
SPATIAL_AXES = ("height", "width", "image_height", "image_width")


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its name, dtype (torch's name, e.g. `float16`) and axes (a name when dynamic, an int when fixed)."""

    name: str
    dtype: str
    axes: tuple[str | int, ...]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Concrete shape for the given axis sizes; KeyError when a dynamic axis has no size."""
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.axes)

    @property
    def dynamic_axes(self) -> dict[int, str]:
        """Position -> axis name of every dynamic axis."""
        return {position: axis for position, axis in enumerate(self.axes) if isinstance(axis, str)}


@dataclass(frozen=True)
class Contract:
    """Inputs and outputs of one component, in order."""

    component: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def axis_names(self) -> tuple[str, ...]:
        """Names of the dynamic axes of the inputs, each once, in order of appearance."""
        return tuple(dict.fromkeys(axis for spec in self.inputs for axis in spec.dynamic_axes.values()))

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_json` reads it back."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Contract:
        """The inverse of `to_json`; KeyError or TypeError on foreign data."""

        def specs(rows: list[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(row["name"], row["dtype"], tuple(row["axes"])) for row in rows)

        return Contract(data["component"], specs(data["inputs"]), specs(data["outputs"]))


@dataclass(frozen=True)
class Range:
    """Smallest, best and largest size of one axis (TensorRT's min, opt, max)."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise InputError(f"range {self.min}..{self.opt}..{self.max} is not ordered: give 1 <= min <= opt <= max")

    def __contains__(self, value: int) -> bool:
        return self.min <= value <= self.max

    def __str__(self) -> str:
        return str(self.min) if self.min == self.max else f"{self.min}..{self.max}"

    @staticmethod
    def fixed(value: int) -> Range:
        """A static axis."""
        return Range(value, value, value)

    @staticmethod
    def parse(text: str) -> Range:
        """Read `512`, `512..768` (opt = min) or `512..640..768`; InputError names the text and the forms."""
        if not re.fullmatch(r"\d+(\.\.\d+){0,2}", text.strip()):
            raise InputError(f"range {text!r} is not understood: give 512, 512..768 or min..opt..max")
        numbers = [int(part) for part in text.strip().split("..")]
        low, high = numbers[0], numbers[-1]
        return Range(low, numbers[1] if len(numbers) == 3 else low, high)


@dataclass(frozen=True)
class ShapeRanges:
    """One optimization profile: images per call, image size in pixels, tokens per prompt."""

    batch: Range
    height: Range
    width: Range
    sequence: Range

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary of `[min, opt, max]` lists."""
        return {name: [r["min"], r["opt"], r["max"]] for name, r in asdict(self).items()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ShapeRanges:
        """The inverse of `to_json`."""
        return ShapeRanges(**{name: Range(*data[name]) for name in ("batch", "height", "width", "sequence")})

    def __str__(self) -> str:
        return f"batch {self.batch}, height {self.height} px, width {self.width} px, {self.sequence} tokens"


def axis_ranges(component: str, ranges: ShapeRanges, vae_scale: int) -> dict[str, Range]:
    """Range of each dynamic axis of a component: the UNet's batch covers one and two halves of guidance."""

    def latent(r: Range) -> Range:
        return Range(r.min // vae_scale, r.opt // vae_scale, r.max // vae_scale)

    guided = Range(ranges.batch.min, 2 * ranges.batch.opt, 2 * ranges.batch.max)
    return {
        "batch": guided if component == "unet" else ranges.batch,
        "sequence": ranges.sequence,
        "height": latent(ranges.height),
        "width": latent(ranges.width),
        "image_height": ranges.height,
        "image_width": ranges.width,
    }


def vae_scale(vae_config: Mapping[str, Any]) -> int:
    """Pixels per latent: 2 ** (levels - 1) of the AutoencoderKL config, 8 for Stable Diffusion."""
    return int(2 ** (len(vae_config["block_out_channels"]) - 1))


def size_multiple(unet_config: Mapping[str, Any], vae_config: Mapping[str, Any]) -> int:
    """Pixels that image height and width must be a multiple of, so that no UNet level has an odd size."""
    return vae_scale(vae_config) * int(2 ** (len(unet_config["block_out_channels"]) - 1))


def check_size(height: int, width: int, multiple: int) -> None:
    """InputError unless both are positive multiples of `multiple` pixels; the message names the nearest sizes."""
    for name, value in (("height", height), ("width", width)):
        if value <= 0 or value % multiple:
            low = max(multiple, value // multiple * multiple)
            raise InputError(
                f"{name} {value} is not a multiple of {multiple} pixels, as this model needs: "
                f"use {low} or {low + multiple}"
            )


def check_precision(name: str) -> Precision:
    """The name as a Precision; InputError lists the choices."""
    if name not in PRECISIONS:
        raise InputError(f"precision {name!r} is unknown: choose one of {', '.join(PRECISIONS)}")
    return name


def unet_contract(config: Mapping[str, Any], precision: Precision) -> Contract:
    """Contract of UNet2DConditionModel; the timestep stays float32, since schedulers use fractional ones."""
    dtype = DTYPES[precision]
    context = config["cross_attention_dim"]
    if not isinstance(context, int):
        raise ModelError(f"cross_attention_dim {context!r} is not one integer: only SD 1.x/2.x UNets are supported")
    return Contract(
        "unet",
        (
            TensorSpec("sample", dtype, ("batch", config["in_channels"], "height", "width")),
            TensorSpec("timestep", "float32", ()),
            TensorSpec("encoder_hidden_states", dtype, ("batch", "sequence", context)),
        ),
        (TensorSpec("out_sample", dtype, ("batch", config["out_channels"], "height", "width")),),
    )


def text_encoder_contract(config: Mapping[str, Any], precision: Precision) -> Contract:
    """Contract of CLIPTextModel: token ids are int64, as tokenizers give them."""
    dtype, hidden = DTYPES[precision], config["hidden_size"]
    return Contract(
        "text_encoder",
        (TensorSpec("input_ids", "int64", ("batch", "sequence")),),
        (
            TensorSpec("last_hidden_state", dtype, ("batch", "sequence", hidden)),
            TensorSpec("pooler_output", dtype, ("batch", hidden)),
        ),
    )


def vae_decoder_contract(config: Mapping[str, Any], precision: Precision) -> Contract:
    """Contract of AutoencoderKL.decode: unscaled latents to an image in [-1, 1]."""
    dtype = DTYPES[precision]
    return Contract(
        "vae_decoder",
        (TensorSpec("latent_sample", dtype, ("batch", config["latent_channels"], "height", "width")),),
        (TensorSpec("sample", dtype, ("batch", config["out_channels"], "image_height", "image_width")),),
    )


def vae_encoder_contract(config: Mapping[str, Any], precision: Precision) -> Contract:
    """Contract of AutoencoderKL.encode: an image in [-1, 1] to mean and log variance, stacked by channel."""
    dtype = DTYPES[precision]
    return Contract(
        "vae_encoder",
        (TensorSpec("sample", dtype, ("batch", config["in_channels"], "image_height", "image_width")),),
        (TensorSpec("latent_parameters", dtype, ("batch", 2 * config["latent_channels"], "height", "width")),),
    )


CONTRACTS = {
    "text_encoder": text_encoder_contract,
    "unet": unet_contract,
    "vae_decoder": vae_decoder_contract,
    "vae_encoder": vae_encoder_contract,
}
CONFIG_FOLDERS = {"text_encoder": "text_encoder", "unet": "unet", "vae_decoder": "vae", "vae_encoder": "vae"}


def component_contract(component: str, config: Mapping[str, Any], precision: Precision) -> Contract:
    """Contract of a component from its own config.json; InputError on an unknown component."""
    if component not in CONTRACTS:
        raise InputError(f"component {component!r} is unknown: choose one of {', '.join(COMPONENTS)}")
    return CONTRACTS[component](config, precision)
