"""The components of a pipeline: their names, where they lie, and the contract of each from its own config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdkd.core.conditions import GUIDANCE, TIMESTEP, Extras, condition_specs, residual_specs
from sdkd.core.contract import DTYPES, Contract, Precision, TensorSpec, is_tiny_vae, vae_scale
from sdkd.errors import InputError, ModelError

CACHED_UNET = "unet_cached"  # the UNet's last layer, run between whole steps (DeepCache, arXiv 2312.00858)
UNETS = ("unet", CACHED_UNET)
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
COMPONENTS = (*TEXT_ENCODERS, "unet", "vae_decoder", "vae_encoder", CACHED_UNET, "controlnet")
DEEP_FEATURE = "deep_feature"  # what reaches that layer from below: an output of the UNet, an input of the last layer


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


def unet_contract(config: Mapping[str, Any], precision: Precision, extras: Extras = Extras()) -> Contract:
    """Contract of UNet2DConditionModel; the timestep stays float32, since schedulers use fractional ones."""
    dtype = DTYPES[precision]
    outputs = (_predicted(config, dtype), *([_deep_feature(config, dtype)] if extras.deep_feature else []))
    inputs = (*_denoising_inputs(config, dtype, extras), *condition_specs(config, dtype, extras))
    return Contract("unet", inputs, outputs)


def cached_unet_contract(config: Mapping[str, Any], precision: Precision, extras: Extras = Extras()) -> Contract:
    """Contract of a UNet's last layer alone: the UNet's inputs and its deep feature of an earlier step."""
    dtype = DTYPES[precision]
    inputs = (*_denoising_inputs(config, dtype, extras), _deep_feature(config, dtype))
    return Contract(CACHED_UNET, inputs, (_predicted(config, dtype),))


def _predicted(config: Mapping[str, Any], dtype: str) -> TensorSpec:
    return TensorSpec("out_sample", dtype, ("batch", config["out_channels"], "height", "width"))


def _deep_feature(config: Mapping[str, Any], dtype: str) -> TensorSpec:
    return TensorSpec(DEEP_FEATURE, dtype, ("batch", config["block_out_channels"][0], "height", "width"))


def _denoising_inputs(config: Mapping[str, Any], dtype: str, extras: Extras = Extras()) -> tuple[TensorSpec, ...]:
    context = config["cross_attention_dim"]
    if not isinstance(context, int):
        raise ModelError(f"cross_attention_dim {context!r} is not one integer: such UNets are not exported")
    return (
        TensorSpec("sample", dtype, ("batch", config["in_channels"], "height", "width")),
        TensorSpec(TIMESTEP, "float32", ("batch",) if extras.timesteps else ()),
        TensorSpec("encoder_hidden_states", dtype, ("batch", "sequence", context)),
    )


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
            *condition_specs(config, dtype),
        ),
        residual_specs(config, dtype, "down_block_res_samples", "mid_block_res_sample"),
    )


def text_encoder_contract(config: Mapping[str, Any], precision: Precision, extras: Extras = Extras()) -> Contract:
    """Contract of CLIPTextModel: token ids are int64, as tokenizers give them."""
    pooled = TensorSpec("pooler_output", DTYPES[precision], ("batch", config["hidden_size"]))
    return _text_contract("text_encoder", config, precision, extras, pooled)


def projected_contract(config: Mapping[str, Any], precision: Precision, extras: Extras = Extras()) -> Contract:
    """Contract of CLIPTextModelWithProjection, SDXL's second text encoder: the projected text is its first output."""
    projected = TensorSpec("text_embeds", DTYPES[precision], ("batch", config["projection_dim"]))
    return _text_contract("text_encoder_2", config, precision, extras, projected)


def _text_contract(
    component: str, config: Mapping[str, Any], precision: Precision, extras: Extras, pooled: TensorSpec
) -> Contract:
    """`last_hidden_state` and the pooled output, in transformers' order; then every layer's hidden state if asked."""
    dtype, hidden = DTYPES[precision], config["hidden_size"]
    layers = range(config["num_hidden_layers"] + 1) if extras.hidden_states else ()
    names = ("last_hidden_state", *(f"hidden_states.{index}" for index in layers))
    states = [TensorSpec(name, dtype, ("batch", "sequence", hidden)) for name in names]
    place = 1 if pooled.name == "pooler_output" else 0
    outputs = (*states[:place], pooled, *states[place:])
    return Contract(component, (TensorSpec("input_ids", "int64", ("batch", "sequence")),), outputs)


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


CONTRACTS = {
    "text_encoder": text_encoder_contract,
    "text_encoder_2": projected_contract,
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
    "text_encoder_2": "text_encoder_2",
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
