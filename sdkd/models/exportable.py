"""What a pipeline's parts must be like to run as engines: one check for export, build and plug.

Of configs, before weights are read: `sdkd.core.contract` declares a graph's inputs, and what a part needs beyond them
would be missed at the first image. Of modules: what was patched, hooked or switched on in them would be lost without a
word.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any

from sdkd.core.conditions import guidance_width
from sdkd.core.contract import vae_scale
from sdkd.errors import ExportError, ModelError, an
from sdkd.families import EMBEDDING, FAMILIES, STABLE_DIFFUSION, family_of_unet
from sdkd.models.ip_adapter import check_projections
from sdkd.models.safetensors_file import has_adapters

Config = Mapping[str, Any]
_EAGERLY = "run it eagerly"
_IP_ADAPTER = "it has an IP-Adapter, which reads images: give the model without it, and --ip-adapter FILE"
_CLASSES = f"it takes class labels, a noise level or image embeddings beside the text: {_EAGERLY}"


_PROJECTED = f"it projects other embeddings than the text encoder's: {_EAGERLY}"
# Keys of UNet2DConditionModel and ControlNetModel with which these have other inputs than the contract's, and which;
# every other key changes what is computed within, which the graph holds.
LIMITS = {
    "encoder_hid_dim_type": _PROJECTED,
    "encoder_hid_dim": _PROJECTED,
    "addition_embed_type": f"it takes conditions that no family of sdkd has, as Kandinsky does: {_EAGERLY}",
    "class_embed_type": _CLASSES,
    "num_class_embeds": _CLASSES,
    "class_embeddings_concat": _CLASSES,
    "attention_type": f"it takes boxes and phrases, as GLIGEN does: {_EAGERLY}",
    "dual_cross_attention": f"it attends to two conditions at once: {_EAGERLY}",
    "global_pool_conditions": "it pools its residuals over the image (global_pool_conditions, as the shuffle model "
    "does), which is not supported: use it with the eager pipeline",
}
_USUAL = (None, False, "default", *(family.addition for family in FAMILIES))  # their values otherwise
# Parts of the Python pipelines, beside the heavy ones, that give a UNet inputs.
EXTRA_PARTS = {"motion_adapter": "a motion adapter of AnimateDiff"}
FLOATS = {"float64", "float32", "float16", "bfloat16"}
LIBRARIES = ("diffusers", "transformers", "torch", "peft", "sdkd")  # whose modules do what their classes say
HELPERS = (*LIBRARIES, "accelerate", "huggingface_hub")  # whose functions those modules have
FREEU = ("s1", "s2", "b1", "b2")  # of an up block
# Plain values of a module that change how it computes, and not what.
SWITCHES = (
    "training",
    "gradient_checkpointing",
    "use_slicing",
    "use_tiling",
    "sliceable_head_dim",
    "fused_projections",
)


def check_config(part: str, config: Config) -> None:
    """ModelError when a UNet or ControlNet has inputs that the contract does not declare."""
    if part not in ("unet", "controlnet"):
        return
    for key, why in LIMITS.items():
        if (value := config.get(key)) not in _USUAL:
            reason = _IP_ADAPTER if value == "ip_image_proj" else why
            raise ModelError(f"the {part} cannot run as an engine, its {key} is {value!r}: {reason}")


def check_guidance(pipeline: str, unet: Config, where: str) -> None:
    """ModelError when a pipeline of this class gives a guidance embedding, and the UNet takes none."""
    if pipeline in EMBEDDING and guidance_width(unet) is None:
        raise ModelError(
            f"{where} is {an(pipeline)}, which gives the UNet its guidance scale as an embedding, and this UNet takes "
            "none (its config has no time_cond_proj_dim): make it a StableDiffusionPipeline, with LCMScheduler and "
            "guidance_scale=1"
        )


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
    vae, controlnet = (configs.get(part) for part in ("vae", "controlnet"))
    for part, own, value, other in (
        (*_text_width(unet, configs), "cross_attention_dim"),
        ("VAE", "latent_channels", (vae or {}).get("latent_channels"), "out_channels"),
    ):
        words = f"its {own} is {{}}, the UNet's {other} {{}}"
        _fit(part, [(value, unet.get(other), words)], "give parts of one family (SD 1.x, SD 2.x, SDXL)")
    if controlnet is not None:
        check_controlnet(controlnet, unet, vae)


def _text_width(unet: Config, configs: Mapping[str, Config]) -> tuple[str, str, int | None]:
    """How wide the text embeddings are that a UNet gets: its family's text encoders side by side."""
    parts = [encoder.part for encoder in family_of_unet(unet).text_encoders]
    widths = [(configs.get(part) or {}).get("hidden_size") for part in parts]
    known = [width for width in widths if width is not None]
    together = sum(known) if len(known) == len(parts) else None
    return (
        ("text encoder", "width", together) if len(parts) == 1 else ("pair of text encoders", "joint width", together)
    )


def _fit(part: str, pairs: Iterable[tuple[Any, Any, str]], advice: str) -> None:
    """ModelError for the first two values that differ, in the words given; None differs from nothing."""
    for ours, theirs, words in pairs:
        if None not in (ours, theirs) and ours != theirs:
            raise ModelError(f"the {part} does not fit the UNet: {words.format(ours, theirs)}: {advice}")


def check_controlnet(controlnet: Config, unet: Config, vae: Config | None = None) -> None:
    """ModelError, naming both values, when a ControlNet's residuals or inputs do not fit a UNet (and its VAE)."""
    check_config("controlnet", controlnet)
    if unet.get("in_channels") == 8:
        raise ModelError(
            f"the UNet takes 8 channels ({STABLE_DIFFUSION.by_channels[8]}), and no pipeline of diffusers uses a "
            "ControlNet with it: leave the ControlNet out"
        )
    stride = 2 ** (len(controlnet.get("conditioning_embedding_out_channels") or (0,) * 4) - 1)
    pairs = [
        *(
            (_listed(controlnet.get(key)), _listed(unet.get(key)), f"its {key} is {{}}, the UNet's is {{}}")
            for key in ("cross_attention_dim", "block_out_channels", "layers_per_block")
        ),
        (controlnet.get("in_channels", 4), unet.get("out_channels", 4), "it takes {} channels, the latents have {}"),
        (stride, vae and vae_scale(vae), "it reads {} pixels per latent, the VAE has {}"),
    ]
    advice = "give a ControlNet that was made for this UNet's family and layout (SD 1.x, SD 2.x, SDXL, not a student)"
    _fit("ControlNet", pairs, advice)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def check_module(part: str, module: Any) -> None:
    """Refuse a PyTorch module whose graph would not be what it computes.

    ExportError for adapters and for quantized or offloaded weights; ModelError as `check_patches` raises it.
    """
    check_projections(module)
    if has_adapters(module.state_dict()):
        fused = any(getattr(layer, "merged_adapters", None) for layer in module.modules())
        what, first = ("fused and still there", "") if fused else ("not fused", "pipe.fuse_lora() and ")
        raise ExportError(f"{part} has LoRA layers that are {what}: call {first}pipe.unload_lora_weights() first")
    kinds = {str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()}
    if getattr(module, "quantization_method", None) or kinds - FLOATS:
        raise ExportError(
            f"{part} is quantized or stored in 8 bits ({', '.join(sorted(kinds))}), and sdkd needs the weights as they "
            "were before: load it without quantization_config or layerwise casting"
        )
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ExportError(f"{part} is offloaded, its weights are elsewhere: call pipe.remove_all_hooks() first")
    check_patches(part, module)


# Patches


def check_patches(name: str, module: Any) -> None:
    """ModelError naming the first thing that makes a module compute something else than its class and weights say."""
    known: set[type] = set()  # classes that were looked at
    for path, part in module.named_modules():
        looks = _LOOKS if type(part) in known else (*_LOOKS, _code)
        known.add(type(part))
        for look in looks:
            if found := look(part):
                where, (what, repair) = ".".join(filter(None, (name, path))), found
                raise ModelError(f"{where} of this pipeline has {what}, which an engine would be without: {repair}")


def check_layers(name: str, module: Any) -> None:
    """ModelError naming the first layer, or plain value of one, that the module's own config does not give it."""
    from accelerate import init_empty_weights

    kind, config = type(module), copy.copy(module.config)
    if not hasattr(kind, "from_config"):  # of transformers
        config.vocab_size = module_config(module)["vocab_size"]
    with init_empty_weights():
        usual = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    layers = dict(module.named_modules())
    for path, layer in usual.named_modules():
        found = layers.get(path)
        found = getattr(found, "base_layer", found)  # under an adapter
        if found is None:
            continue  # its weights tell
        changed = "class" if type(found) is not type(layer) else _changed(layer, found)
        if changed:
            where = ".".join(filter(None, (name, path)))
            raise ModelError(
                f"{where} of this pipeline has another {changed} than its config says, which an engine would be "
                f"without (such as circular padding): load the {name} again, or export this pipeline and run it with "
                "engines.load_pipeline"
            )


def module_config(module: Any) -> dict[str, Any]:
    """A module's config (diffusers' FrozenDict or transformers' PretrainedConfig) as a plain dictionary that is true.

    diffusers takes the embeddings of a textual inversion away and leaves their number in the config.
    """
    config: Any = module.config
    found = dict(config.to_dict() if hasattr(config, "to_dict") else config)
    if "vocab_size" in found and hasattr(module, "get_input_embeddings"):
        found["vocab_size"] = int(module.get_input_embeddings().num_embeddings)
    return found


def _changed(usual: Any, found: Any) -> str | None:
    """The name of the first plain value that differs."""
    plain = (bool, int, float, str, tuple)
    return next(
        (
            name
            for name, value in vars(usual).items()
            if isinstance(value, plain) and not name.startswith(("_", "tile_")) and name not in SWITCHES
            if name in vars(found) and vars(found)[name] != value
        ),
        None,
    )


Found = tuple[str, str] | None  # what a module has, and what to do about it


def _hooks(part: Any) -> Found:
    if "_hf_hook" in vars(part):
        return "hooks of accelerate (offloading)", "call pipe.remove_all_hooks() first"
    if "_diffusers_hook" in vars(part):
        kinds = ", ".join(getattr(part._diffusers_hook, "hooks", {}))
        return f"hooks of diffusers ({kinds})", "load the model again, and leave out casting, caching and offloading"
    for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values()):
        if _root(hook) != "transformers":  # which captures hidden states in this way
            return f"a forward hook ({getattr(hook, '__qualname__', type(hook).__name__)})", "remove it first"
    return None


def _features(part: Any) -> Found:
    own = vars(part)
    if any(own.get(name) is not None for name in FREEU):
        return "FreeU on", "call pipe.disable_freeu() first"
    if type(getattr(part, "encoder_hid_proj", None)).__name__ not in ("NoneType", "MultiIPAdapterImageProjection"):
        return "a projection of other embeddings (encoder_hid_proj)", _EAGERLY
    if type(own.get("processor")).__name__.startswith("Fused"):  # what they leave when unfused is harmless
        return "fused QKV projections", "call pipe.unfuse_qkv_projections() first"
    return None


def _patches(part: Any) -> Found:
    kind = type(part)
    own = (name for name, value in vars(part).items() if callable(value) and callable(getattr(kind, name, None)))
    if replaced := next(own, None):
        return f"{an(replaced)} of its own", "remove the patch (such as DeepCache's) first"
    if hasattr(part, "parametrizations"):
        return "parametrized weights", "call torch.nn.utils.parametrize.remove_parametrizations first"
    return None


def _code(part: Any) -> Found:
    kind, repair = type(part), "take it off first (as tomesd.remove_patch)"
    if _root(kind) not in LIBRARIES:
        return f"code of its own ({kind.__module__}.{kind.__qualname__})", repair
    for base in kind.__mro__:
        for name, value in vars(base).items():
            function = getattr(value, "__func__", value)  # of a static or class method
            if isinstance(function, FunctionType) and _root(function) not in (*HELPERS, _root(base)):
                return f"code of its own ({base.__qualname__}.{name} of {function.__module__})", repair
    return None


def _root(thing: Any) -> str:
    return str(getattr(thing, "__module__", None)).partition(".")[0]


_LOOKS: tuple[Callable[[Any], Found], ...] = (_hooks, _features, _patches)
