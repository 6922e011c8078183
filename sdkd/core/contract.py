"""What each component looks like from outside: tensor names, named axes and dtypes.

Export, parity, build and run time all derive from this one declaration. Names follow Optimum's ONNX layout.
Axis letters: batch, sequence (tokens), height and width (latents), image_height and image_width (pixels), and
height_2, width_2, height_4, ... (latents halved once, twice, ... inside the UNet).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from sdkd.core.schema import construct
from sdkd.errors import InputError

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
EnginePrecision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
QUANTIZED: tuple[EnginePrecision, ...] = ("int8", "fp8")  # of engines: their tensors, and the graph's, are not
ENGINE_PRECISIONS: tuple[EnginePrecision, ...] = (*PRECISIONS, *QUANTIZED)
_FOUR_OR_EIGHT = ("int4", "uint4", "nf4", "fp4", "uint8", "qint8", "w8a8")  # names that peers have, nearest to int8
DTYPES: dict[Precision, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def _size(axis: str, sizes: Mapping[str, int]) -> int:
    name, *change = axis.split(" ")
    factor = int(change[1]) if change else 1
    return sizes[name] // factor if change[:1] == ["/"] else sizes[name] * factor


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its name, dtype (torch's name, e.g. `float16`) and axes (a name when dynamic, an int when fixed).

    An output's axis may be worked out from an input's, as in `height * 8`: Optimum allocates outputs by that.
    """

    name: str
    dtype: str
    axes: tuple[str | int, ...]

    @cached_property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Concrete shape for the given axis sizes; KeyError when a dynamic axis has no size."""
        return tuple(_size(axis, sizes) if isinstance(axis, str) else axis for axis in self.axes)

    @cached_property
    def dynamic_axes(self) -> dict[int, str]:
        """Position -> axis name of every dynamic axis."""
        return {position: axis for position, axis in enumerate(self.axes) if isinstance(axis, str)}


@dataclass(frozen=True)
class Contract:
    """Inputs and outputs of one component, in order."""

    component: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @cached_property
    def batched(self) -> tuple[str, ...]:
        """Names of the inputs whose first axis is a dynamic batch."""
        return tuple(spec.name for spec in self.inputs if spec.axes[:1] == ("batch",))

    def axis_names(self) -> tuple[str, ...]:
        """Names of the dynamic axes of the inputs, each once, in order of appearance."""
        return tuple(dict.fromkeys(axis for spec in self.inputs for axis in spec.dynamic_axes.values()))

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_json` reads it back."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Contract:
        """The inverse of `to_json`; TypeError on foreign data."""
        found: Contract = construct(data, Contract)
        return found


def split_axis(axis: str) -> tuple[str, int]:
    """An axis's root and how often it was divided: `height_4` -> (`height`, 4), `batch` -> (`batch`, 1)."""
    root, _, divisor = axis.rpartition("_")
    return (root, int(divisor)) if divisor.isdigit() else (axis, 1)


def halved(axis: str, times: int) -> str:
    """The name of an axis that was halved so many times; see `split_axis`."""
    return f"{axis}_{2**times}" if times else axis


def vae_scale(vae_config: Mapping[str, Any]) -> int:
    """Pixels per latent: 2 ** (levels - 1) of the VAE's config, 8 for Stable Diffusion."""
    levels = vae_config.get("block_out_channels") or vae_config["decoder_block_out_channels"]
    return int(2 ** (len(levels) - 1))


def native_size(unet_config: Mapping[str, Any], vae_config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width in pixels that a UNet was trained for, by its `sample_size`; None where the config has none."""
    sample = unet_config.get("sample_size")
    sides = [sample, sample] if isinstance(sample, int) else list(sample or ())
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        return None
    return sides[0] * vae_scale(vae_config), sides[1] * vae_scale(vae_config)


def size_multiple(unet_config: Mapping[str, Any], vae_config: Mapping[str, Any]) -> int:
    """Pixels that image height and width must be a multiple of, so that no UNet level has an odd size."""
    return vae_scale(vae_config) * latent_multiple(unet_config)


def latent_multiple(unet_config: Mapping[str, Any]) -> int:
    """What the sides of a UNet's or ControlNet's latents must be a multiple of."""
    return int(2 ** (len(unet_config["block_out_channels"]) - 1))


def check_size(height: int, width: int, multiple: int) -> None:
    """InputError unless both are positive multiples of `multiple` pixels; the message names the nearest sizes."""
    for name, value in (("height", height), ("width", width)):
        if value <= 0 or value % multiple:
            low = max(multiple, value // multiple * multiple)
            raise InputError(
                f"{name} {value} is not a multiple of {multiple} pixels, as this model needs: "
                f"use {low} or {low + multiple}"
            )


def torch_dtype(precision: str) -> torch.dtype:
    """The torch dtype of a precision; InputError lists the choices."""
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[check_precision(precision)])
    return dtype


def check_precision(name: str) -> Precision:
    """The name as a Precision; InputError lists the choices, and says how engines come to have eight bits."""
    if name not in PRECISIONS:
        eight = name if name in QUANTIZED else "int8" if name.lower() in _FOUR_OR_EIGHT else ""
        more = f"; export in fp32 or fp16, then sdkd build-engine BUNDLE --target TARGET --precision {eight}"
        raise InputError(f"precision {name!r} is unknown: choose one of {', '.join(PRECISIONS)}{more * bool(eight)}")
    return name


def check_engine_precision(name: str) -> EnginePrecision:
    """The name as an EnginePrecision; InputError lists the choices."""
    if name not in ENGINE_PRECISIONS:
        near = "; the nearest to it is int8" * (name.lower() in _FOUR_OR_EIGHT)
        choices = ", ".join(ENGINE_PRECISIONS)
        raise InputError(f"precision {name!r} of an engine is unknown: choose one of {choices}{near}")
    return name


def is_tiny_vae(config: Mapping[str, Any]) -> bool:
    """Whether a VAE's config is AutoencoderTiny's (TAESD)."""
    return "decoder_block_out_channels" in config
