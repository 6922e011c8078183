"""What a pipeline's parts must be like for graphs with the contract's inputs: one check for export, build and plug.

Everything is read from configs, before weights are. `sdkd.contract` declares the inputs; what a part needs beyond them
would be lost in a graph without a word, or would be missed at the first image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sdkd.contract import residual_specs, split_axis, vae_scale
from sdkd.errors import ExportError, ModelError
from sdkd.families import PIPELINE_OF_CHANNELS
from sdkd.weight_files import has_adapters

Config = Mapping[str, Any]
_EAGERLY = "run it eagerly"
_IP_ADAPTER = "it has an IP-Adapter, which reads images: remove it first with pipe.unload_ip_adapter()"
_CLASSES = f"it takes class labels, a noise level or image embeddings beside the text: {_EAGERLY}"
_ADDED = f"it takes conditions beside the text, as SDXL and Kandinsky do: {_EAGERLY}"


class Limit(NamedTuple):
    """A config key, the values with which a module has the contract's inputs, and why it has not with any other."""

    key: str
    usual: tuple[Any, ...]
    why: str


# Of UNet2DConditionModel and ControlNetModel; every other key changes what is computed within, which the graph holds.
LIMITS = (
    Limit(
        "time_cond_proj_dim",
        (None,),
        "it takes the guidance scale as an input, as LCM-distilled UNets do, and guidance-embedded UNets are not "
        f"supported yet: {_EAGERLY}, or give its base model",
    ),
    Limit("encoder_hid_dim_type", (None,), f"it projects other embeddings than the text encoder's: {_EAGERLY}"),
    Limit("encoder_hid_dim", (None,), f"it projects other embeddings than the text encoder's: {_EAGERLY}"),
    Limit("addition_embed_type", (None,), _ADDED),
    Limit("class_embed_type", (None,), _CLASSES),
    Limit("num_class_embeds", (None,), _CLASSES),
    Limit("class_embeddings_concat", (None, False), _CLASSES),
    Limit("attention_type", (None, "default"), f"it takes boxes and phrases, as GLIGEN does: {_EAGERLY}"),
    Limit("dual_cross_attention", (None, False), f"it attends to two conditions at once: {_EAGERLY}"),
    Limit(
        "global_pool_conditions",
        (None, False),
        "it pools its residuals over the image (global_pool_conditions, as the shuffle model does), "
        "which is not supported: use it with the eager pipeline",
    ),
)
# Parts of the Python pipelines, beside the heavy ones, that give a UNet inputs; and what to do.
EXTRA_PARTS = {
    "adapter": "a T2I-Adapter, whose residuals no graph takes",
    "motion_adapter": "a motion adapter of AnimateDiff",
}


FLOATS = {"float64", "float32", "float16", "bfloat16"}


def check_config(part: str, config: Config) -> None:
    """ModelError when a UNet or ControlNet has inputs that the contract does not declare."""
    if part not in ("unet", "controlnet"):
        return
    for key, usual, why in LIMITS:
        if (value := config.get(key)) not in usual:
            reason = _IP_ADAPTER if value == "ip_image_proj" else why
            raise ModelError(f"the {part} cannot run as an engine, its {key} is {value!r}: {reason}")


def check_extra_parts(pipe: Any) -> None:
    """ModelError for a pipeline whose UNet gets tensors from a part that no bundle holds."""
    for name, what in EXTRA_PARTS.items():
        if getattr(pipe, name, None) is not None:
            raise ModelError(f"this {type(pipe).__name__} has {what}: give a pipeline without it, or run it eagerly")


def check_configs(configs: Mapping[str, Config]) -> None:
    """ModelError when parts (`unet`, `vae`, `text_encoder`, `controlnet`; some may be absent) cannot run as engines.

    Each by itself, and together: widths and blocks that pass tensors to one another must agree.
    """
    for part, config in configs.items():
        check_config(part, config)
    unet = configs.get("unet")
    if unet is None:
        return
    if (text := configs.get("text_encoder")) is not None:
        width = text.get("hidden_size")
        _agree("text encoder", "width", width, "UNet's cross_attention_dim", unet.get("cross_attention_dim"))
    vae, controlnet = configs.get("vae"), configs.get("controlnet")
    if vae is not None:
        channels = vae.get("latent_channels")
        _agree("VAE", "latent_channels", channels, "UNet's out_channels", unet.get("out_channels"))
    if controlnet is not None:
        check_controlnet(controlnet, unet, vae)


def _agree(what: str, own: str, value: Any, other: str, wanted: Any) -> None:
    if value is not None and wanted is not None and value != wanted:
        raise ModelError(
            f"the {what} does not fit the UNet: its {own} is {value}, the {other} {wanted}. Give parts of one family "
            "(SD 1.x, SD 2.x)"
        )


def check_controlnet(controlnet: Config, unet: Config, vae: Config | None = None) -> None:
    """ModelError, naming both values, when a ControlNet's residuals or inputs do not fit a UNet (and its VAE)."""
    check_config("controlnet", controlnet)
    advice = "give a ControlNet that was made for this UNet's family and layout (SD 1.x, SD 2.x, not a student)"
    for key in ("cross_attention_dim", "block_out_channels", "layers_per_block"):
        if (ours := _listed(controlnet.get(key))) != (theirs := _listed(unet.get(key))) and None not in (ours, theirs):
            raise ModelError(
                f"the ControlNet does not fit the UNet: its {key} is {ours}, the UNet's is {theirs}: {advice}"
            )
    ours, theirs = (_residuals(config) for config in (controlnet, unet))
    if ours != theirs:
        raise ModelError(
            f"the ControlNet does not fit the UNet: it gives {len(ours)} residuals of {ours}, and the UNet takes "
            f"{len(theirs)} of {theirs} (channels, part of the size): {advice}"
        )
    channels = unet.get("in_channels", 4)
    if channels == 8:
        raise ModelError(
            f"the UNet takes {channels} channels ({PIPELINE_OF_CHANNELS[8]}), and no pipeline of diffusers uses a "
            "ControlNet with it: leave the ControlNet out"
        )
    latents = controlnet.get("in_channels", 4)
    if latents != unet.get("out_channels", 4):
        raise ModelError(
            f"the ControlNet does not fit the UNet: it takes {latents} channels, the latents have "
            f"{unet.get('out_channels', 4)}: {advice}"
        )
    stride = 2 ** (len(controlnet.get("conditioning_embedding_out_channels") or (0,) * 4) - 1)
    if vae is not None and stride != (scale := vae_scale(vae)):
        raise ModelError(
            f"the ControlNet does not fit the VAE: it reads {stride} pixels per latent, the VAE has {scale}: {advice}"
        )


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _residuals(config: Config) -> list[tuple[Any, int]]:
    """Channels of every residual, and by what the latents' size is divided."""
    return [(spec.axes[1], split_axis(str(spec.axes[2]))[1]) for spec in residual_specs(config, "float32", "", "")]


def check_module(part: str, module: Any) -> None:
    """ExportError for a PyTorch module with adapters, or with fused, quantized or offloaded weights."""
    if "IPAdapter" in type(getattr(module, "encoder_hid_proj", None)).__name__:  # no key of the config says so
        raise ExportError(f"the {part} cannot run as an engine: {_IP_ADAPTER}")
    if has_adapters(module.state_dict()):
        raise ExportError(
            f"{part} has LoRA layers that are not fused: call pipe.fuse_lora() and pipe.unload_lora_weights() first"
        )
    if any(
        type(processor).__name__.startswith("Fused") for processor in getattr(module, "attn_processors", {}).values()
    ):
        raise ExportError(f"{part} has fused projections (to_qkv): call pipe.unfuse_qkv_projections() first")
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ExportError(f"{part} is offloaded, its weights are elsewhere: call pipe.remove_all_hooks() first")
    kinds = {str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()}
    if getattr(module, "quantization_method", None) or kinds - FLOATS:
        raise ExportError(
            f"{part} is quantized or stored in 8 bits ({', '.join(sorted(kinds))}), and sdkd needs the weights as they "
            "were before: load it without quantization_config or layerwise casting"
        )
