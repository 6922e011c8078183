"""The four components as modules that torch.export understands: tensors in, tensors out, in the contract's order.

Nothing here knows a published model: names, widths and depths come from the component's own config, so that a teacher,
its students (with or without mid block, three or four levels) and the demo's pipeline go through the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sdkd.contract import CONFIG_FOLDERS, Contract, Precision, TensorSpec, component_contract
from sdkd.errors import ExportError, ModelError

# Every size differs from every other, and none is 0 or 1: torch.export must not take two axes for one, nor a size for
# a constant.
EXAMPLE = {"batch": 2, "sequence": 11, "height": 3, "width": 5}

# Parameters and buffers that belong to a component, where it shares its module with another one.
STATE_PREFIXES: dict[str, tuple[str, ...]] = {
    "vae_decoder": ("decoder.", "post_quant_conv."),
    "vae_encoder": ("encoder.", "quant_conv."),
}
# Attention processors without weights that compute the same as torch's scaled_dot_product_attention.
REPLACED = ("AttnProcessor", "SlicedAttnProcessor", "XFormersAttnProcessor")


class TextEncoderGraph(nn.Module):
    """CLIPTextModel: input_ids [batch, sequence] int64 -> last_hidden_state [batch, sequence, width], pooler_output."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode token ids with the causal mask only, as StableDiffusionPipeline does."""
        output = self.module(input_ids)
        return output.last_hidden_state, output.pooler_output


class UNetGraph(nn.Module):
    """UNet2DConditionModel: sample, timestep (a float32 scalar), encoder_hidden_states -> out_sample."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor]:
        """One denoising step; sample is [batch, channels, height, width] in latents."""
        return (self.module(sample, timestep, encoder_hidden_states, return_dict=False)[0],)


class VaeDecoderGraph(nn.Module):
    """AutoencoderKL.decode: latent_sample [batch, latent channels, height, width], already unscaled -> sample."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, latent_sample: torch.Tensor) -> tuple[torch.Tensor]:
        """Decode without slicing or tiling, which would be traced as fixed loops."""
        quant = getattr(self.module, "post_quant_conv", None)
        return (self.module.decoder(latent_sample if quant is None else quant(latent_sample)),)  # type: ignore[operator]


class VaeEncoderGraph(nn.Module):
    """AutoencoderKL.encode: sample [batch, channels, image_height, image_width] -> latent_parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor]:
        """Mean and log variance, stacked by channel; sampling stays outside the graph."""
        moments = self.module.encoder(sample)  # type: ignore[operator]
        quant = getattr(self.module, "quant_conv", None)
        return (moments if quant is None else quant(moments),)


GRAPHS: dict[str, type[nn.Module]] = {
    "text_encoder": TextEncoderGraph,
    "unet": UNetGraph,
    "vae_decoder": VaeDecoderGraph,
    "vae_encoder": VaeEncoderGraph,
}


def component_module(pipe: Any, component: str) -> nn.Module:
    """The pipeline's module of a component (both VAE halves share one); ModelError when the pipeline lacks it."""
    name = CONFIG_FOLDERS[component]
    module = getattr(pipe, name, None)
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    if not isinstance(module, nn.Module):
        raise ModelError(f"the pipeline has no PyTorch {name} (found {type(module).__name__}): give an eager pipeline")
    if any(".lora_" in key or ".base_layer." in key for key in module.state_dict()):
        raise ExportError(
            f"{name} has LoRA layers that are not fused: call pipe.fuse_lora() and pipe.unload_lora_weights() first"
        )
    return module


def standard_attention(module: nn.Module) -> nn.Module:
    """Undo memory-saving attention (sliced, xformers, unfused), which would be traced as loops; the module itself.

    Processors with weights of their own, such as an IP-Adapter's, stay.
    """
    if hasattr(module, "attn_processors"):
        from diffusers.models.attention_processor import AttnProcessor2_0

        found: dict[str, Any] = module.attn_processors  # type: ignore[assignment]
        plain = {name: AttnProcessor2_0() if type(it).__name__ in REPLACED else it for name, it in found.items()}
        module.set_attn_processor(plain)  # type: ignore[operator]
    return module


def component_config(module: nn.Module) -> dict[str, Any]:
    """A module's config as a plain dictionary (diffusers' FrozenDict or transformers' PretrainedConfig)."""
    config: Any = module.config
    return dict(config.to_dict() if hasattr(config, "to_dict") else config)


def graph_module(component: str, module: nn.Module) -> nn.Module:
    """The component's module behind positional tensor inputs and a tuple of outputs, in eval mode."""
    return GRAPHS[component](module).eval()


def module_contract(component: str, module: nn.Module, precision: Precision) -> Contract:
    """The contract from the module's own config."""
    return component_contract(component, component_config(module), precision)


def component_state(component: str, module: nn.Module) -> dict[str, torch.Tensor]:
    """State dict of a component under its diffusers (or transformers) names; tensors are not copied."""
    prefixes = STATE_PREFIXES.get(component, ("",))
    return {name: value for name, value in module.state_dict().items() if name.startswith(prefixes)}


def axis_multiples(component: str, config: Mapping[str, Any]) -> dict[str, int]:
    """What each spatial axis is a multiple of: the down-sampling inside the component.

    A UNet of n levels halves n - 1 times; with another size its skip connections would differ in size from its
    up-sampled ones, and diffusers would take a branch (`forward_upsample_size`) that must not be traced.
    """
    levels = len(config.get("block_out_channels", ())) or 1
    down = 2 ** (levels - 1)
    if component == "unet":
        return {"height": down, "width": down}
    return {"image_height": down, "image_width": down} if component == "vae_encoder" else {}


def example_sizes(contract: Contract, config: Mapping[str, Any]) -> dict[str, int]:
    """Axis sizes to trace with: all different, none of them 0 or 1."""
    multiples = axis_multiples(contract.component, config)

    def size(axis: str) -> int:
        return EXAMPLE[axis.removeprefix("image_")] * multiples.get(axis, 1)

    return {axis: size(axis) for axis in contract.axis_names()}


def example_inputs(
    contract: Contract, sizes: Mapping[str, int], seed: int = 0, timestep: float = 500.5, tokens: int = 256
) -> tuple[torch.Tensor, ...]:
    """Seeded inputs in the contract's order and dtypes: normal values, token ids below `tokens`, one timestep.

    Values are drawn in float32 and then cast, so that every precision is asked the same question.
    """
    generator = torch.Generator().manual_seed(seed)

    def tensor(spec: TensorSpec) -> torch.Tensor:
        shape, dtype = spec.shape(sizes), getattr(torch, spec.dtype)
        if not shape:
            return torch.tensor(timestep, dtype=dtype)
        if not dtype.is_floating_point:
            return torch.randint(0, tokens, shape, generator=generator, dtype=dtype)
        return torch.randn(shape, generator=generator).to(dtype)

    return tuple(tensor(spec) for spec in contract.inputs)


def dynamic_shapes(contract: Contract, config: Mapping[str, Any]) -> tuple[dict[int, Any] | None, ...]:
    """One `{position: Dim}` per input for torch.export; an axis name that occurs twice is one Dim."""
    from torch.export import Dim

    multiples = axis_multiples(contract.component, config)
    # diffusers' Upsample2D makes batches of 64 and more contiguous: a branch, though the graph has no such step and
    # takes any batch. A text encoder has as many position embeddings as its config says, 77 for CLIP.
    limits = {"batch": 63}
    if contract.component == "text_encoder":
        limits["sequence"] = config["max_position_embeddings"]
    roots = {axis: Dim(f"{axis}_", min=1, max=limits.get(axis)) for axis in contract.axis_names()}
    dims = {axis: root * multiples.get(axis, 1) if axis in multiples else root for axis, root in roots.items()}
    return tuple(
        {position: dims[axis] for position, axis in spec.dynamic_axes.items()} or None for spec in contract.inputs
    )
