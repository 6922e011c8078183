"""Modules that honour diffusers' and transformers' contracts and run on engines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from transformers import CLIPTextConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from engines.modules.base import EngineModule, adapter_scale, cast_feeds, in_dtype, refuse, run_split
from engines.modules.conditions import condition_tensors, scalar, timesteps
from engines.modules.image_prompts import ImagePrompts
from engines.sessions.base import Rebuild, Session
from engines.sessions.weights import EngineWeights
from sdkd.core.components import DEEP_FEATURE
from sdkd.core.conditions import image_specs, takes_sizes
from sdkd.errors import EngineError, RangeError
from sdkd.models.ip_adapter import IP_ADAPTERS
from sdkd.models.step_caching import Call, StepCache

TEXT_REFUSALS = {
    "attention_mask": "the engine has CLIP's causal mask built in, so only a mask of ones can be given",
    "output_attentions": "the engine returns the last hidden state and the pooled output only",
    "output_hidden_states": "the engine returns the last hidden state only; for clip_skip export with --hidden-states",
}


class EngineUNet(EngineModule):
    """Stands for UNet2DConditionModel; `session` is an engine of component `unet`.

    With `last_layer`, an engine of component `unet_cached`, steps are cached: see `sdkd.models.step_caching`.
    """

    stands_for = UNet2DConditionModel

    def __init__(
        self,
        session: Session,
        config: Mapping[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        original: torch.nn.Module | None = None,
        *,
        last_layer: Session | None = None,
        cache_interval: int = 1,
    ) -> None:
        super().__init__(session, config, dtype, device, original)
        self.last_layer, self.cache = last_layer, StepCache(cache_interval)
        self.weights = EngineWeights(session, () if last_layer is None else (last_layer,))
        self.images: ImagePrompts | None = None
        if image_specs(session.contract):
            details = session.checked.bundle.component("unet").details[IP_ADAPTERS]
            self.images = ImagePrompts(session.contract, details, self.config)
            self.config.encoder_hid_dim_type = "ip_image_proj"  # an attribute, as diffusers sets it

    def sessions(self) -> Iterable[Session]:
        """The engine of the whole UNet, and that of its last layer."""
        return (self.session,) if self.last_layer is None else (self.session, self.last_layer)

    def close(self) -> None:
        """As every module; what was kept for later steps goes, too."""
        super().close()
        self.cache.clear()

    @property
    def in_channels(self) -> int:
        """Channels of the latents."""
        return int(self.config.in_channels)

    @property
    def add_embedding(self) -> Any:
        """Where SDXL's pipelines look for how wide the sizes and the pooled text are together."""
        if not takes_sizes(self.config):
            raise AttributeError("add_embedding")
        width = int(self.config.projection_class_embeddings_input_dim)
        return SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    def follow(self, before: object, rebuild: Rebuild | None, falls_back: bool = False) -> None:
        """As every module; IP-Adapters keep the scales that they had."""
        super().follow(before, rebuild, falls_back)
        if self.images is not None:
            self.images.follow(getattr(before, "attn_processors", {}))

    def _prompted(self, name: str) -> ImagePrompts:
        """The engine's IP-Adapters, asked for by the name of an attribute; AttributeError where it has none."""
        if self.images is None:
            raise AttributeError(name)
        return self.images

    @property
    def encoder_hid_proj(self) -> Any:
        """Where pipelines look for how many IP-Adapters there are, and what they read of an image."""
        return self._prompted("encoder_hid_proj").projection

    @property
    def attn_processors(self) -> Any:
        """Where `set_ip_adapter_scale` sets the scales of IP-Adapters."""
        return self._prompted("attn_processors").processors

    @property
    def down_blocks(self) -> Any:
        """Where `set_ip_adapter_scale` looks for blocks with attention."""
        return self._prompted("down_blocks").blocks("down")

    @property
    def up_blocks(self) -> Any:
        """As `down_blocks`."""
        return self._prompted("up_blocks").blocks("up")

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """Nothing; with IP-Adapters the names of their layers, where `set_ip_adapter_scale` looks for them."""
        names = () if self.images is None else self.images.processors
        return super().state_dict(*arguments, **options) | {name: torch.empty(0) for name in names}

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        *,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        **conditions: Any,
    ) -> Any:
        """Predict from latents `[batch, in_channels, height, width]`, one timestep and text `[batch, tokens, width]`.

        `conditions`: what else UNet2DConditionModel takes, as far as the engine has inputs for it
        (`sdkd.core.conditions`); a `timestep_cond` is `[batch or 1, time_cond_proj_dim]`, None is the UNet without it.
        Returns a UNet2DConditionOutput, or a tuple, of `[batch, out_channels, height, width]` in the latents' dtype.
        EngineError for an argument that the engine has no input for; RangeError outside the built sizes.
        """
        given = {name: value for name, value in locals().items() if name not in ("self", "conditions")} | conditions
        self.weights.scale(adapter_scale(self, cross_attention_kwargs))
        tensors = {
            "sample": sample,
            "timestep": timesteps(self, timestep, sample),
            "encoder_hidden_states": encoder_hidden_states,
        }
        if self.images is not None:
            conditions = self.images.completed(type(self).__name__, conditions, sample)
        tensors |= condition_tensors(self, sample, conditions)
        self.weights.apply_pending()
        call = Call(sample, timestep, encoder_hidden_states, self.weights.version)
        try:
            result = in_dtype(self._predict(tensors, call), sample.dtype)
        except RangeError as error:
            self.cache.clear()
            return self.fall_back(error, given)
        return UNet2DConditionOutput(sample=result) if return_dict else (result,)

    def _predict(self, tensors: dict[str, torch.Tensor], call: Call) -> torch.Tensor:
        """The engine's answer, or that of its last layer with what a whole call of the same image has left."""
        feature = None if self.last_layer is None else self.cache.feature(call)
        if self.last_layer is None or feature is None:
            found = run_split(self.session, cast_feeds(self.session, tensors))
            if self.last_layer is not None:
                self.cache.keep(call, found[DEEP_FEATURE])
        else:
            found = run_split(self.last_layer, cast_feeds(self.last_layer, {**tensors, DEEP_FEATURE: feature}))
        return found["out_sample"]


class EngineControlNet(EngineModule, ControlNetModel):
    """Stands for ControlNetModel, which it also is by class: diffusers' pipelines ask for that before they call it."""

    stands_for = ControlNetModel

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        controlnet_cond: torch.Tensor,
        conditioning_scale: float = 1.0,
        *,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
        **conditions: Any,
    ) -> Any:
        """Residuals for a UNet (ControlNetOutput) from its own inputs and an image `[batch, 3, 8 height, 8 width]`.

        The image is in [0, 1]; `guess_mode` lets them grow from 0.1 to 1 with depth, as diffusers does. EngineError for
        an argument that the engine has no input for; RangeError outside the built sizes.
        """
        given = {name: value for name, value in locals().items() if name not in ("self", "conditions")} | conditions
        adapter_scale(self, cross_attention_kwargs)
        tensors = {
            "sample": sample,
            "timestep": timesteps(self, timestep, sample),
            "encoder_hidden_states": encoder_hidden_states,
            "controlnet_cond": controlnet_cond,
            "conditioning_scale": scalar(conditioning_scale, sample),
            **condition_tensors(self, sample, conditions),
        }
        try:
            found = run_split(self.session, cast_feeds(self.session, tensors))
        except RangeError as error:
            return self.fall_back(error, given)
        every = [found[spec.name].to(sample.dtype) for spec in self.session.contract.outputs]
        if guess_mode:
            scales = torch.logspace(-1, 0, len(every), device=sample.device)
            every = [tensor * scale for tensor, scale in zip(every, scales, strict=True)]
        if not return_dict:
            return every[:-1], every[-1]
        return ControlNetOutput(down_block_res_samples=tuple(every[:-1]), mid_block_res_sample=every[-1])


class _OutOfReach:
    """What ControlNetModel has and an engine has not: to read it is the error that all engine modules raise."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: object, owner: type) -> Any:
        raise AttributeError(self.name)  # of a module: its `__getattr__` says why


for _name in dir(ControlNetModel):
    if not _name.startswith("_") and not hasattr(EngineModule, _name) and _name not in vars(EngineControlNet):
        setattr(EngineControlNet, _name, _OutOfReach(_name))


class EngineTextEncoder(EngineModule):
    """Stands for transformers' CLIPTextModel, or CLIPTextModelWithProjection where the engine projects the text."""

    _norm: torch.nn.Module | None = None

    def full_config(self, config: Mapping[str, Any]) -> CLIPTextConfig:
        """As transformers reads it."""
        return CLIPTextConfig.from_dict(dict(config))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """Token ids `[batch, tokens]` to `last_hidden_state [batch, tokens, width]` and `pooler_output [batch, width]`.

        A BaseModelOutputWithPooling, or a tuple, in this module's dtype; of a CLIPTextModelWithProjection a
        CLIPTextModelOutput, whose `text_embeds [batch, projection_dim]` come first. EngineError for an argument that
        the engine has no input or output for.
        """
        given = {name: value for name, value in locals().items() if name not in ("self", "others")} | others
        layers = [spec.name for spec in self.session.contract.outputs[2:]]
        hidden_states = output_hidden_states and not layers
        refuse(self, {**others, "attention_mask": attention_mask, "output_hidden_states": hidden_states}, TEXT_REFUSALS)
        self.weights.apply_pending()
        try:
            found = run_split(self.session, cast_feeds(self.session, {"input_ids": input_ids}))
        except RangeError as error:
            return self.fall_back(error, given)
        results = {spec.name: found[spec.name].to(self.dtype) for spec in self.session.contract.outputs[:2]}
        hidden = tuple(found[name].to(self.dtype) for name in layers) if output_hidden_states else None
        if return_dict is False:
            return (*results.values(), hidden) if hidden else tuple(results.values())
        kind = CLIPTextModelOutput if "text_embeds" in results else BaseModelOutputWithPooling
        return kind(**results, hidden_states=hidden)

    @property
    def text_model(self) -> torch.nn.Module:
        """Where StableDiffusionPipeline looks for `final_layer_norm` when clip_skip asks for an earlier layer."""
        if self._norm is None:  # no submodule: an engine module has no parameters
            object.__setattr__(self, "_norm", _final_norm(self.session, self.config).to(self.device, self.dtype))
        holder = torch.nn.Module()
        holder.final_layer_norm = self.__dict__["_norm"]
        return holder


def _final_norm(session: Session, config: Any) -> torch.nn.LayerNorm:
    """CLIP's last norm, with its weights from the exported graph; EngineError where the graph has lost their names."""
    import onnx
    from onnx import numpy_helper

    file, found = session.checked.graph, {}
    for tensor in onnx.load(file).graph.initializer:
        if "final_layer_norm." in tensor.name:
            found[tensor.name.rpartition(".")[2]] = torch.tensor(numpy_helper.to_array(tensor).tolist())
    if set(found) != {"weight", "bias"}:
        raise EngineError(f"{file.name} of the text encoder has no final_layer_norm by name: export the model again")
    norm = torch.nn.LayerNorm(len(found["bias"]), eps=float(config.layer_norm_eps))
    norm.load_state_dict(found)
    return norm.requires_grad_(False)
