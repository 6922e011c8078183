"""Modules that honour diffusers' and transformers' contracts and run on engines: UNet, VAE and text encoder.

They are plain `nn.Module`s without parameters, not `ModelMixin`s: `DiffusionPipeline.from_pipe` hands a ModelMixin over
only when its class is exactly the one in the signature. Dtypes are cast once, at the edge: engines run in the bundle's
precision, the pipeline keeps its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from transformers import CLIPTextConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from engines.session import Session, torch_dtype
from sdkd.errors import EngineError

# Why an argument of the eager UNet has no counterpart in an engine.
_FIXED = "the engine's graph has no such input"
UNET_REFUSALS = {
    "class_labels": _FIXED,
    "timestep_cond": f"{_FIXED}: guidance-embedded (LCM-distilled) UNets are not exported",
    "attention_mask": f"{_FIXED}: Stable Diffusion attends to all tokens",
    "encoder_attention_mask": f"{_FIXED}: Stable Diffusion attends to all tokens",
    "cross_attention_kwargs": "an engine's attention processors and LoRA scale are fixed when it is built",
    "added_cond_kwargs": f"{_FIXED}: IP-Adapter and SDXL conditions are not exported",
    "down_block_additional_residuals": f"{_FIXED}: ControlNet residuals are not exported",
    "mid_block_additional_residual": f"{_FIXED}: ControlNet residuals are not exported",
    "down_intrablock_additional_residuals": f"{_FIXED}: T2I-Adapter residuals are not exported",
}
TEXT_REFUSALS = {
    "attention_mask": "the engine has CLIP's causal mask built in",
    "position_ids": _FIXED,
    "inputs_embeds": _FIXED,
    "output_attentions": "the engine returns the last hidden state and the pooled output only",
    "output_hidden_states": "the engine returns the last hidden state only, so clip_skip needs the eager text encoder",
}


def refuse(module: object, arguments: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """EngineError naming the first argument that is neither None nor empty, with the reason and the way out."""
    for name, value in arguments.items():
        empty = value is None or value is False or (isinstance(value, Mapping | tuple | list) and not value)
        if not empty:
            raise EngineError(
                f"{type(module).__name__} cannot take {name}: {reasons.get(name, _FIXED)}. Leave it out, or run "
                "eagerly: engines.unplug(pipe)"
            )


def run_split(session: Session, feeds: Mapping[str, torch.Tensor], limit: int | None = None) -> dict[str, torch.Tensor]:
    """Run a session, a batch larger than its built range (or `limit`) in near-equal parts along the batch axis.

    Raises RangeError, from the session, for every other axis and for a part below the smallest built batch.
    """
    batched = [spec.name for spec in session.contract.inputs if spec.axes[:1] == ("batch",)]
    largest = min(session.limits["batch"].max, limit or session.limits["batch"].max)
    parts = -(-feeds[batched[0]].shape[0] // largest)
    if parts <= 1:
        return session.run(feeds)
    pieces = zip(*(feeds[name].tensor_split(parts) for name in batched), strict=True)
    results = [session.run({**feeds, **dict(zip(batched, piece, strict=True))}) for piece in pieces]
    return {name: torch.cat([result[name] for result in results]) for name in results[0]}


def cast_feeds(session: Session, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in the dtypes of the session's contract."""
    return {spec.name: tensors[spec.name].to(torch_dtype(spec.dtype)) for spec in session.contract.inputs}


class EngineModule(torch.nn.Module):
    """A parameterless module with a device and a dtype that follow `.to()`, as pipelines expect.

    `original` is the eager module that it stands for, kept for `unplug`, or None.
    """

    place: torch.Tensor

    def __init__(
        self, config: Any, dtype: torch.dtype, device: torch.device, original: torch.nn.Module | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("place", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self._internal_dict = config  # diffusers repairs old configs by replacing this attribute
        object.__setattr__(self, "original", original)  # no submodule: `.to()` and hooks must not reach it

    @property
    def config(self) -> Any:
        """The component's configuration, as the eager module has it."""
        return self._internal_dict

    @property
    def dtype(self) -> torch.dtype:
        """The pipeline's dtype; the engine's own precision is in its contract."""
        return self.place.dtype

    @property
    def device(self) -> torch.device:
        """Where the pipeline keeps its tensors."""
        return self.place.device

    def sessions(self) -> Iterable[Session]:
        """The opened engines of this module."""
        raise NotImplementedError

    def close(self) -> None:
        """Release the engines; calling the module afterwards is an EngineError."""
        for session in self.sessions():
            session.close()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f"{type(self).__name__} has no {name!r}: the layers of an engine cannot be reached or changed; "
                "engines.unplug(pipe) brings the eager module back"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_hf_hook":  # accelerate's offloading
            raise EngineError(
                f"{type(self).__name__} cannot be offloaded: its weights live inside the engine. Leave out "
                "enable_model_cpu_offload / enable_sequential_cpu_offload, or run eagerly: engines.unplug(pipe)"
            )
        super().__setattr__(name, value)


def full_config(model: Any, config: Mapping[str, Any]) -> FrozenDict:
    """A diffusers config with the defaults of the model's class where an older config.json has no value."""
    parameters = inspect.signature(model.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return FrozenDict(defaults | dict(config))


class EngineUNet(EngineModule):
    """Stands for UNet2DConditionModel; `session` is an engine of component `unet`."""

    def __init__(self, session: Session, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device,
                 original: torch.nn.Module | None = None) -> None:  # fmt: skip
        super().__init__(full_config(UNet2DConditionModel, config), dtype, device, original)
        self.session = session

    @property
    def in_channels(self) -> int:
        """Channels of the latents."""
        return int(self.config.in_channels)

    def sessions(self) -> Iterable[Session]:
        """The UNet's engine."""
        return (self.session,)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        down_block_additional_residuals: tuple[torch.Tensor, ...] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        down_intrablock_additional_residuals: tuple[torch.Tensor, ...] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:
        """Predict from latents `[batch, in_channels, height, width]`, one timestep and text `[batch, tokens, width]`.

        Returns `[batch, out_channels, height, width]` in the latents' dtype. EngineError for an argument that the
        engine has no input for; RangeError outside the built sizes.
        """
        given = locals()
        refuse(self, {name: given[name] for name in UNET_REFUSALS}, UNET_REFUSALS)
        feeds = cast_feeds(
            self.session,
            {
                "sample": sample,
                "timestep": _one_timestep(timestep, sample),
                "encoder_hidden_states": encoder_hidden_states,
            },
        )
        result = run_split(self.session, feeds)["out_sample"].to(sample.dtype)
        return UNet2DConditionOutput(sample=result) if return_dict else (result,)


def _one_timestep(timestep: torch.Tensor | float | int, sample: torch.Tensor) -> torch.Tensor:
    """The timestep as a scalar tensor beside the latents; EngineError when samples have different ones."""
    if not isinstance(timestep, torch.Tensor):
        return torch.tensor(float(timestep), device=sample.device)
    if timestep.numel() > 1 and not bool((timestep == timestep.flatten()[0]).all()):
        raise EngineError(
            f"EngineUNet takes one timestep for the whole batch, not {timestep.tolist()}: call it once per timestep"
        )
    return timestep.flatten()[0].to(sample.device)


class EngineVAE(EngineModule):
    """Stands for AutoencoderKL; without an encoder session only `decode` works."""

    def __init__(self, decoder: Session, encoder: Session | None, config: Mapping[str, Any], dtype: torch.dtype,
                 device: torch.device, original: torch.nn.Module | None = None) -> None:  # fmt: skip
        super().__init__(full_config(AutoencoderKL, config), dtype, device, original)
        self.decoder_session = decoder
        self.encoder_session = encoder
        self.use_slicing = False
        self.use_tiling = False

    def sessions(self) -> Iterable[Session]:
        """The decoder's engine, and the encoder's when there is one."""
        return (self.decoder_session,) if self.encoder_session is None else (self.decoder_session, self.encoder_session)

    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Unscaled latents `[batch, channels, height, width]` to images in [-1, 1]; the generator is unused."""
        image = self._run(self.decoder_session, z)
        return DecoderOutput(sample=image) if return_dict else (image,)

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[Any]:
        """Images in [-1, 1] to the distribution of their unscaled latents; EngineError without an encoder engine."""
        if self.encoder_session is None:
            raise EngineError(
                "this EngineVAE has no vae_encoder engine, which image-to-image and inpainting need: export and build "
                "the bundle with the component vae_encoder"
            )
        latents = DiagonalGaussianDistribution(self._run(self.encoder_session, x))
        return AutoencoderKLOutput(latent_dist=latents) if return_dict else (latents,)

    def _run(self, session: Session, tensor: torch.Tensor) -> torch.Tensor:
        feeds = cast_feeds(session, {session.contract.inputs[0].name: tensor})
        result = run_split(session, feeds, limit=1 if self.use_slicing else None)
        return result[session.contract.outputs[0].name].to(tensor.dtype)

    def enable_slicing(self) -> None:
        """Run one image at a time, to save memory."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Run whole batches again."""
        self.use_slicing = False

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """EngineError: an engine's sizes are fixed by its ranges."""
        if use_tiling:
            raise EngineError(
                "EngineVAE cannot tile: build its engine for the sizes you need (sdkd build-engine --size), or "
                "run eagerly: engines.unplug(pipe)"
            )

    def disable_tiling(self) -> None:
        """Nothing to do: an engine never tiles."""


class EngineTextEncoder(EngineModule):
    """Stands for transformers' CLIPTextModel; `session` is an engine of component `text_encoder`."""

    def __init__(self, session: Session, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device,
                 original: torch.nn.Module | None = None) -> None:  # fmt: skip
        super().__init__(CLIPTextConfig.from_dict(dict(config)), dtype, device, original)
        self.session = session

    def sessions(self) -> Iterable[Session]:
        """The text encoder's engine."""
        return (self.session,)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[torch.Tensor, ...]:
        """Token ids `[batch, tokens]` to `last_hidden_state [batch, tokens, width]` and `pooler_output [batch, width]`.

        Both in this module's dtype. EngineError for an argument that the engine has no input or output for.
        """
        given = locals()
        refuse(self, {name: given[name] for name in TEXT_REFUSALS}, TEXT_REFUSALS)
        found = run_split(self.session, cast_feeds(self.session, {"input_ids": input_ids}))
        results = [found[spec.name].to(self.dtype) for spec in self.session.contract.outputs]
        if return_dict is False:
            return tuple(results)
        return BaseModelOutputWithPooling(last_hidden_state=results[0], pooler_output=results[1])
