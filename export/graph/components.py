"""The components as modules that torch.export understands: tensors in, tensors out, in the contract's order.

Nothing here knows a published model: names, widths and depths come from the component's own config, so that a teacher,
its students (with or without mid block, three or four levels) and the demo's pipeline go through the same code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from sdkd.core.components import (
    CACHED_UNET,
    CONFIG_FOLDERS,
    DEEP_FEATURE,
    STATE_PREFIXES,
    TEXT_ENCODERS,
    UNETS,
    component_contract,
)
from sdkd.core.conditions import LARGEST_TIME_ID, TIME_IDS, TIMESTEP, Extras, pack
from sdkd.core.contract import Contract, Precision, TensorSpec, split_axis
from sdkd.errors import ModelError
from sdkd.models.exportable import check_config, check_module, module_config
from sdkd.models.ip_adapter import image_prompts
from sdkd.models.step_caching import deep_features, last_layer

# Every size differs from every other, and none is 0 or 1: torch.export must not take two axes for one, nor a size for
# a constant.
EXAMPLE = {"batch": 2, "sequence": 11, "height": 3, "width": 5, "images": 4}

# Attention processors without weights that compute the same as torch's scaled_dot_product_attention.
REPLACED = ("AttnProcessor", "SlicedAttnProcessor", "XFormersAttnProcessor")


class ComponentGraph(nn.Module):
    """A component's module behind the contract's tensors: positional inputs, a tuple of outputs."""

    plain = 1  # leading inputs that are arguments of their own; those after them travel as one tuple

    module: Any  # diffusers' or transformers' own

    def __init__(self, module: nn.Module, contract: Contract) -> None:
        super().__init__()
        self.module, self.contract = module, contract
        self.outputs = len(contract.outputs)


class TextEncoderGraph(ComponentGraph):
    """CLIPTextModel: input_ids -> last_hidden_state, pooler_output; CLIPTextModelWithProjection: -> text_embeds,
    last_hidden_state. Then, where asked for, every layer's hidden state.
    """

    def __init__(self, module: nn.Module, contract: Contract) -> None:
        super().__init__(module, contract)
        self.names = [spec.name for spec in contract.outputs[:2]]
        self.every = self.outputs > 2

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Encode token ids with the causal mask only, as diffusers' pipelines do."""
        output = self.module(input_ids, output_hidden_states=True) if self.every else self.module(input_ids)
        return *(getattr(output, name) for name in self.names), *(output.hidden_states if self.every else ())


class UNetGraph(ComponentGraph):
    """UNet2DConditionModel: sample, timestep (float32), encoder_hidden_states and its conditions -> out_sample.

    Conditions: see `sdkd.core.conditions`. For step caching the deep feature is a second output.
    """

    plain = 3

    def __init__(self, module: nn.Module, contract: Contract) -> None:
        super().__init__(module, contract)
        self.cached = any(spec.name == DEEP_FEATURE for spec in contract.outputs)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, *more: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """One denoising step; sample is [batch, channels, height, width] in latents."""
        added = pack(self.contract, more)
        with contextlib.ExitStack() as stack:
            found = stack.enter_context(deep_features(self.module)) if self.cached else []
            predicted = self.module(sample, timestep, encoder_hidden_states, return_dict=False, **added)[0]
        return predicted, *(feature.to(predicted.dtype) for feature in found)


class LastLayer(nn.Module):
    """What runs of a UNet2DConditionModel between whole steps: the same modules, under the same names."""

    get_time_embed = UNet2DConditionModel.get_time_embed

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.config = unet.config
        for name in (
            "time_proj",
            "time_embedding",
            "time_embed_act",
            "conv_in",
            "conv_norm_out",
            "conv_act",
            "conv_out",
        ):
            setattr(self, name, getattr(unet, name))
        block = unet.up_blocks[-1]
        layers = {name: _last_only(getattr(block, name)) for name in ("resnets", "attentions")}
        self.up_blocks = nn.ModuleDict({str(len(unet.up_blocks) - 1): nn.ModuleDict(layers)})


def _last_only(layers: Any) -> nn.ModuleDict:
    return nn.ModuleDict({str(len(layers) - 1): layers[-1]})


class CachedUNetGraph(ComponentGraph):
    """LastLayer: a UNet's inputs and the deep feature of an earlier step -> out_sample."""

    plain = 4

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        deep_feature: torch.Tensor,
    ) -> tuple[torch.Tensor]:
        """A denoising step between two whole ones."""
        return (last_layer(self.module, sample, timestep, encoder_hidden_states, deep_feature),)


class ControlNetGraph(ComponentGraph):
    """ControlNetModel: a UNet's inputs, an image and the conditioning scale -> residuals, the middle's last."""

    plain = 5

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        controlnet_cond: torch.Tensor,
        conditioning_scale: torch.Tensor,
        *more: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Residuals of one step, scaled; `guess_mode` is left to the caller, who multiplies them once more."""
        plain = (sample, timestep, encoder_hidden_states, controlnet_cond, conditioning_scale)
        down, middle = self.module(*plain, return_dict=False, **pack(self.contract, more))
        return *down, middle


class VaeDecoderGraph(ComponentGraph):
    """AutoencoderKL's or AutoencoderTiny's decode: latent_sample, already unscaled -> sample."""

    def forward(self, latent_sample: torch.Tensor) -> tuple[torch.Tensor]:
        """Decode without slicing or tiling, which would be traced as fixed loops."""
        quant = getattr(self.module, "post_quant_conv", None)
        return (self.module.decoder(latent_sample if quant is None else quant(latent_sample)),)


class VaeEncoderGraph(ComponentGraph):
    """AutoencoderKL's encode: sample -> latent_parameters; AutoencoderTiny's: sample -> latents."""

    def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor]:
        """Mean and log variance, stacked by channel; sampling stays outside the graph."""
        moments = self.module.encoder(sample)
        quant = getattr(self.module, "quant_conv", None)
        return (moments if quant is None else quant(moments),)


GRAPHS: dict[str, type[ComponentGraph]] = {
    **dict.fromkeys(TEXT_ENCODERS, TextEncoderGraph),
    "unet": UNetGraph,
    CACHED_UNET: CachedUNetGraph,
    "vae_decoder": VaeDecoderGraph,
    "vae_encoder": VaeEncoderGraph,
    "controlnet": ControlNetGraph,
}


def component_module(pipe: Any, component: str) -> nn.Module:
    """The pipeline's module of a component (both VAE halves share one).

    ModelError when the pipeline lacks it or it is of another class, ExportError as `check_module` raises it.
    """
    name = CONFIG_FOLDERS[component]
    module = getattr(pipe, name, None)
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    if not isinstance(module, nn.Module):
        raise ModelError(f"the pipeline has no PyTorch {name} (found {type(module).__name__}): give an eager pipeline")
    if type(module).__name__ == "MultiControlNetModel":
        raise ModelError(
            f"the pipeline has {len(pipe.controlnet.nets)} ControlNets, and a bundle holds one: set "
            "pipe.controlnet to one of pipe.controlnet.nets, or leave controlnet out of components: several run "
            "eagerly beside its UNet"
        )
    check_module(name, module)
    return module


def standard_attention(module: nn.Module) -> nn.Module:
    """Undo memory-saving attention (sliced, xformers, unfused), which would be traced as loops; the module itself.

    Processors with weights of their own, such as an IP-Adapter's, stay.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0

    parts: Iterable[Any] = module.modules()
    for part in parts:
        if type(getattr(part, "processor", None)).__name__ in REPLACED:
            part.set_processor(AttnProcessor2_0())
    return module


def graph_module(contract: Contract, module: nn.Module) -> ComponentGraph:
    """The component's module behind positional tensor inputs and a tuple of outputs, in eval mode."""
    return GRAPHS[contract.component](module, contract).eval()


def module_contract(component: str, module: nn.Module, precision: Precision, extras: Extras = Extras()) -> Contract:
    """The contract from the module's own config and IP-Adapters; ModelError where it needs other inputs."""
    config = module_config(module)
    check_config(CONFIG_FOLDERS[component], config)
    if component == "unet":
        extras = replace(extras, images=image_prompts(module, extras.image_tokens))
    return component_contract(component, config, precision, extras)


def component_state(component: str, module: nn.Module) -> dict[str, torch.Tensor]:
    """State dict of a component under its diffusers (or transformers) names; tensors are not copied."""
    prefixes = STATE_PREFIXES.get(component, ("",))
    return {name: value for name, value in module.state_dict().items() if name.startswith(prefixes)}


def axis_factors(contract: Contract, config: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """Each dynamic axis as a multiple of a root that can be any number: `height_2` of SD's UNet -> (`height`, 4).

    A UNet of n levels halves n - 1 times; with another size its skip connections would differ in size from its
    up-sampled ones, and diffusers would take a branch (`forward_upsample_size`) that must not be traced.
    """
    widths = config.get("block_out_channels") or config.get("decoder_block_out_channels") or (1,)
    down = int(2 ** (len(widths) - 1))
    stride = int(2 ** (len(config.get("conditioning_embedding_out_channels", (1,))) - 1))  # of a ControlNet's image
    latents = down if contract.component in (*UNETS, "controlnet") else 1
    pixels = down * stride if contract.component in ("vae_encoder", "controlnet") else 1
    steps = {"height": latents, "width": latents, "image_height": pixels, "image_width": pixels}

    def factor(axis: str) -> tuple[str, int]:
        root, divisor = split_axis(axis)
        return root.removeprefix("image_"), steps.get(root, 1) // divisor

    return {axis: factor(axis) for axis in contract.axis_names()}


def axis_sizes(contract: Contract, config: Mapping[str, Any], roots: Mapping[str, int]) -> dict[str, int]:
    """Axis sizes for batch, sequence, height and width, the last two in the smallest steps that the model allows."""
    return {axis: roots[root] * factor for axis, (root, factor) in axis_factors(contract, config).items()}


def example_sizes(contract: Contract, config: Mapping[str, Any]) -> dict[str, int]:
    """Axis sizes to trace with: all different, none of them 0 or 1."""
    return axis_sizes(contract, config, EXAMPLE)


def example_inputs(
    contract: Contract, sizes: Mapping[str, int], seed: int = 0, timestep: float = 500.5, tokens: int = 256
) -> tuple[torch.Tensor, ...]:
    """Seeded inputs in the contract's order and dtypes: normal values, token ids below `tokens`, timesteps up to one.

    Values are drawn in float32 and then cast, so that every precision is asked the same question.
    """
    generator = torch.Generator().manual_seed(seed)

    def tensor(spec: TensorSpec) -> torch.Tensor:
        shape, dtype = spec.shape(sizes), getattr(torch, spec.dtype)
        if spec.name == TIMESTEP and shape:  # each sample has its own
            return timestep * torch.rand(shape, generator=generator)
        if not shape:
            return torch.tensor(timestep if spec.name == TIMESTEP else 0.75, dtype=dtype)
        if spec.name == TIME_IDS:  # sizes and crops in pixels
            return torch.randint(0, LARGEST_TIME_ID, shape, generator=generator).to(dtype)
        if not dtype.is_floating_point:
            return torch.randint(0, tokens, shape, generator=generator, dtype=dtype)
        return torch.randn(shape, generator=generator).to(dtype)

    return tuple(tensor(spec) for spec in contract.inputs)


def dynamic_shapes(contract: Contract, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """One `{position: Dim}` per argument of the graph module for torch.export; axes of one root share one Dim."""
    from torch.export import Dim

    # diffusers' Upsample2D makes batches of 64 and more contiguous: a branch, though the graph has no such step and
    # takes any batch. A text encoder has as many position embeddings as its config says, 77 for CLIP.
    limits = {"batch": 63}
    if contract.component in TEXT_ENCODERS:
        limits["sequence"] = config["max_position_embeddings"]
    factors = axis_factors(contract, config)
    roots = {root: Dim(f"{root}_", min=1, max=limits.get(root)) for root, _ in factors.values()}
    dims = {axis: roots[root] * factor if factor > 1 else roots[root] for axis, (root, factor) in factors.items()}
    shapes = tuple(
        {position: dims[axis] for position, axis in spec.dynamic_axes.items()} or None for spec in contract.inputs
    )
    plain = GRAPHS[contract.component].plain
    return (*shapes[:plain], shapes[plain:]) if shapes[plain:] else shapes
