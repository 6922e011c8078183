"""What each component looks like from outside: tensor names, named axes and dtypes.

Export, parity, build and run time all derive from this one declaration. Names follow Optimum's ONNX layout.
Axis letters: batch, sequence (tokens), height and width (latents), image_height and image_width (pixels), and
height_2, width_2, height_4, ... (latents halved once, twice, ... inside the UNet).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from sdkd.core.schema import construct
from sdkd.errors import InputError, ModelError

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
EnginePrecision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
QUANTIZED: tuple[EnginePrecision, ...] = ("int8", "fp8")  # of engines: their tensors, and the graph's, are not
ENGINE_PRECISIONS: tuple[EnginePrecision, ...] = (*PRECISIONS, *QUANTIZED)
_FOUR_OR_EIGHT = ("int4", "uint4", "nf4", "fp4", "uint8", "qint8", "w8a8")  # names that peers have, nearest to int8
DTYPES: dict[Precision, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
BASE_COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")  # of every pipeline
CACHED_UNET = "unet_cached"  # the UNet's last layer, run between whole steps (DeepCache, arXiv 2312.00858)
UNETS = ("unet", CACHED_UNET)
COMPONENTS = (*BASE_COMPONENTS, CACHED_UNET, "controlnet")
DEEP_FEATURE = "deep_feature"  # what reaches that layer from below: an output of the UNet, an input of the last layer
GUIDANCE = "timestep_cond"  # the guidance scale's embedding (LCM, arXiv 2310.04378)
MID_RESIDUAL = "mid_block_additional_residual"
DOWN_RESIDUAL = "down_block_additional_residuals"


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

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Concrete shape for the given axis sizes; KeyError when a dynamic axis has no size."""
        return tuple(_size(axis, sizes) if isinstance(axis, str) else axis for axis in self.axes)

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
        """The inverse of `to_json`; TypeError on foreign data."""
        found: Contract = construct(data, Contract)
        return found


def guidance_copies(contract: Contract) -> int:
    """How many inputs a pipeline stacks for classifier-free guidance: `unet_copies`, a ControlNet's 2, else 1."""
    if contract.component not in UNETS:
        return 2 if contract.component == "controlnet" else 1
    embedded = any(spec.name == GUIDANCE for spec in contract.inputs)
    return unet_copies(int(contract.inputs[0].axes[1]), int(contract.outputs[0].axes[1]), embedded)


def unet_copies(in_channels: int, out_channels: int, embedded: bool = False) -> int:
    """Latents per image in a guided UNet call: 2, for instruct-pix2pix 3, with a guidance embedding 1.

    InstructPix2Pix (arXiv 2211.09800, section 3.2.1) guides by text and by image, and its UNet takes the image's
    latents beside the noisy ones: twice as many channels in as out.
    """
    return 1 if embedded else 3 if in_channels == 2 * out_channels else 2


def guidance_width(unet_config: Mapping[str, Any]) -> int | None:
    """Width of the guidance embedding that a UNet takes, if any."""
    return unet_config.get("time_cond_proj_dim")


def split_axis(axis: str) -> tuple[str, int]:
    """An axis's root and how often it was divided: `height_4` -> (`height`, 4), `batch` -> (`batch`, 1)."""
    root, _, divisor = axis.rpartition("_")
    return (root, int(divisor)) if divisor.isdigit() else (axis, 1)


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


@dataclass(frozen=True)
class Extras:
    """What a component can have beyond the usual: all hidden states (text encoder), ControlNet residuals and the
    output for step caching (UNet).
    """

    hidden_states: bool = False
    residuals: bool = False
    deep_feature: bool = False


def unet_contract(config: Mapping[str, Any], precision: Precision, extras: Extras = Extras()) -> Contract:
    """Contract of UNet2DConditionModel; the timestep stays float32, since schedulers use fractional ones."""
    dtype = DTYPES[precision]
    outputs = (_predicted(config, dtype), *([_deep_feature(config, dtype)] if extras.deep_feature else []))
    added = residual_specs(config, dtype, DOWN_RESIDUAL, MID_RESIDUAL) if extras.residuals else ()
    if (width := guidance_width(config)) is not None:
        added = (TensorSpec(GUIDANCE, dtype, ("batch", width)), *added)
    return Contract("unet", (*_denoising_inputs(config, dtype), *added), outputs)


def cached_unet_contract(config: Mapping[str, Any], precision: Precision, extras: Extras = Extras()) -> Contract:
    """Contract of a UNet's last layer alone: the UNet's inputs and its deep feature of an earlier step."""
    dtype = DTYPES[precision]
    inputs = (*_denoising_inputs(config, dtype), _deep_feature(config, dtype))
    return Contract(CACHED_UNET, inputs, (_predicted(config, dtype),))


def _predicted(config: Mapping[str, Any], dtype: str) -> TensorSpec:
    return TensorSpec("out_sample", dtype, ("batch", config["out_channels"], "height", "width"))


def _deep_feature(config: Mapping[str, Any], dtype: str) -> TensorSpec:
    return TensorSpec(DEEP_FEATURE, dtype, ("batch", config["block_out_channels"][0], "height", "width"))


def _denoising_inputs(config: Mapping[str, Any], dtype: str) -> tuple[TensorSpec, ...]:
    context = config["cross_attention_dim"]
    if not isinstance(context, int):
        raise ModelError(f"cross_attention_dim {context!r} is not one integer: only SD 1.x/2.x UNets are supported")
    return (
        TensorSpec("sample", dtype, ("batch", config["in_channels"], "height", "width")),
        TensorSpec("timestep", "float32", ()),
        TensorSpec("encoder_hidden_states", dtype, ("batch", "sequence", context)),
    )


def residual_specs(config: Mapping[str, Any], dtype: str, down: str, mid: str) -> tuple[TensorSpec, ...]:
    """One tensor per skip connection of a UNet's down blocks, in order, named `<down>.0`, ...; then the middle's.

    UNet2DConditionModel's order: `conv_in`, then of every block its layers and, but for the last block, its halving.
    """
    widths = config["block_out_channels"]
    layers = config["layers_per_block"]
    counts = [layers] * len(widths) if isinstance(layers, int) else layers
    shapes = [(widths[0], 0)]
    for level, (width, count) in enumerate(zip(widths, counts, strict=True)):
        shapes += [(width, level)] * count
        shapes += [(width, level + 1)] * (level < len(widths) - 1)
    tensors = [*((f"{down}.{index}", *shape) for index, shape in enumerate(shapes)), (mid, widths[-1], len(widths) - 1)]
    return tuple(
        TensorSpec(name, dtype, ("batch", width, _halved("height", level), _halved("width", level)))
        for name, width, level in tensors
    )


def _halved(axis: str, times: int) -> str:
    return f"{axis}_{2**times}" if times else axis


def controlnet_contract(config: Mapping[str, Any], precision: Precision, extras: Extras = Extras()) -> Contract:
    """Contract of ControlNetModel (arXiv 2302.05543): a UNet's inputs, an image in [0, 1], the conditioning scale."""
    dtype = DTYPES[precision]
    image = ("batch", config.get("conditioning_channels", 3), "image_height", "image_width")
    return Contract(
        "controlnet",
        (
            *_denoising_inputs(config, dtype),
            TensorSpec("controlnet_cond", dtype, image),
            TensorSpec("conditioning_scale", "float32", ()),
        ),
        residual_specs(config, dtype, "down_block_res_samples", "mid_block_res_sample"),
    )


def text_encoder_contract(config: Mapping[str, Any], precision: Precision, extras: Extras = Extras()) -> Contract:
    """Contract of CLIPTextModel: token ids are int64, as tokenizers give them."""
    dtype, hidden = DTYPES[precision], config["hidden_size"]
    layers = range(config["num_hidden_layers"] + 1) if extras.hidden_states else ()
    return Contract(
        "text_encoder",
        (TensorSpec("input_ids", "int64", ("batch", "sequence")),),
        (
            TensorSpec("last_hidden_state", dtype, ("batch", "sequence", hidden)),
            TensorSpec("pooler_output", dtype, ("batch", hidden)),
            *(TensorSpec(f"hidden_states.{index}", dtype, ("batch", "sequence", hidden)) for index in layers),
        ),
    )


def vae_decoder_contract(config: Mapping[str, Any], precision: Precision, extras: Extras = Extras()) -> Contract:
    """Contract of AutoencoderKL's or AutoencoderTiny's `decode`: unscaled latents to an image in [-1, 1]."""
    dtype, scale = DTYPES[precision], vae_scale(config)
    return Contract(
        "vae_decoder",
        (TensorSpec("latent_sample", dtype, ("batch", config["latent_channels"], "height", "width")),),
        (TensorSpec("sample", dtype, ("batch", config["out_channels"], f"height * {scale}", f"width * {scale}")),),
    )


def vae_encoder_contract(config: Mapping[str, Any], precision: Precision, extras: Extras = Extras()) -> Contract:
    """Contract of `encode`: an image in [-1, 1] to mean and log variance, stacked by channel.

    AutoencoderTiny has no distribution: its `latents` are the answer.
    """
    dtype, scale, channels = DTYPES[precision], vae_scale(config), config["latent_channels"]
    output = ("latents", channels) if is_tiny_vae(config) else ("latent_parameters", 2 * channels)
    return Contract(
        "vae_encoder",
        (TensorSpec("sample", dtype, ("batch", config["in_channels"], "image_height", "image_width")),),
        (TensorSpec(output[0], dtype, ("batch", output[1], f"image_height / {scale}", f"image_width / {scale}")),),
    )


def is_tiny_vae(config: Mapping[str, Any]) -> bool:
    """Whether a VAE's config is AutoencoderTiny's (TAESD)."""
    return "decoder_block_out_channels" in config


CONTRACTS = {
    "text_encoder": text_encoder_contract,
    "unet": unet_contract,
    CACHED_UNET: cached_unet_contract,
    "vae_decoder": vae_decoder_contract,
    "vae_encoder": vae_encoder_contract,
    "controlnet": controlnet_contract,
}
# Parameters and buffers that belong to a component, where it shares its module with another one.
STATE_PREFIXES: dict[str, tuple[str, ...]] = {
    "vae_decoder": ("decoder.", "post_quant_conv."),
    "vae_encoder": ("encoder.", "quant_conv."),
}
CONFIG_FOLDERS = {
    "text_encoder": "text_encoder",
    "unet": "unet",
    CACHED_UNET: "unet",
    "vae_decoder": "vae",
    "vae_encoder": "vae",
    "controlnet": "controlnet",
}


def check_components(names: Sequence[str] | None) -> None:
    """InputError for a name that is no component, or no name at all; None stands for all that there are."""
    unknown = [name for name in names or () if name not in COMPONENTS]
    if unknown or not (names is None or names):
        raise InputError(f"component {(unknown or ['none'])[0]!r} is unknown: choose from {', '.join(COMPONENTS)}")


def component_contract(
    component: str, config: Mapping[str, Any], precision: Precision, extras: Extras = Extras()
) -> Contract:
    """Contract of a component from its own config.json; InputError on an unknown component."""
    check_components([component])
    return CONTRACTS[component](config, precision, extras)
