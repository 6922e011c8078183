"""Modules that honour diffusers' and transformers' contracts and run on engines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from transformers import CLIPTextConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from engines.modules.base import FIXED, EngineModule, adapter_scale, cast_feeds, refuse, run_split
from engines.sessions.base import Session
from engines.sessions.weights import EngineWeights
from sdkd.core.components import DEEP_FEATURE
from sdkd.core.conditions import ADDED, CONDITIONS, Condition, takes_sizes
from sdkd.core.contract import TensorSpec, split_axis
from sdkd.errors import EngineError, RangeError
from sdkd.models.step_caching import Call, StepCache

MASKS = f"{FIXED}: Stable Diffusion attends to all tokens, so only a mask of ones can be given"
# Why an argument of the eager module has no counterpart in an engine, where it is not simply FIXED.
REFUSALS = {
    "attention_mask": MASKS,
    "encoder_attention_mask": MASKS,
    f"{ADDED}['image_embeds']": f"{FIXED}: IP-Adapter's are not exported",
    **{
        name: f"{FIXED}: {row.absent}"
        for row in CONDITIONS
        for prefix in row.prefixes
        for name in (prefix, f"{ADDED}[{prefix!r}]")
    },
}
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
        tensors |= condition_tensors(self, sample, conditions)
        self.weights.apply_pending()
        call = Call(sample, timestep, encoder_hidden_states, self.weights.version)
        try:
            result = self._predict(tensors, call).to(sample.dtype)
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


def condition_tensors(
    module: EngineModule, sample: torch.Tensor, arguments: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """A call's conditions by input name; zeros where one is not given and need not be.

    EngineError for a condition that the engine has no input for, one that it needs, and tensors that do not fit it.
    """
    rest = dict(arguments)
    found: dict[str, torch.Tensor] = {}
    for row in CONDITIONS:
        if specs := row.of(module.session.contract):
            tensors = row.unpack(rest)
            _check_fit(module, row, specs, tensors, sample)
            found |= dict(zip((spec.name for spec in specs), tensors, strict=False))
            found |= {spec.name: _zeros(spec, sample) for spec in specs[len(tensors) :]}
    added = rest.pop(ADDED, None)
    refuse(module, rest | {f"{ADDED}[{name!r}]": value for name, value in (added or {}).items()}, REFUSALS)
    batch = sample.shape[0]
    return {name: tensor.expand(batch, *tensor.shape[1:]) for name, tensor in found.items()}


def _check_fit(
    module: EngineModule, row: Condition, specs: Sequence[TensorSpec], tensors: Sequence[Any], sample: torch.Tensor
) -> None:
    """EngineError unless tensors are as many, and as wide, as a condition has inputs."""
    name = type(module).__name__
    if row.needed and len(tensors) < len(specs):
        raise EngineError(f"{name} needs {', '.join(spec.name for spec in specs)}: {row.misfit}")
    if tensors and not 0 <= len(specs) - len(tensors) <= row.spare:
        raise EngineError(f"{name} takes {len(specs)} {row.name}, not {len(tensors)}: {row.misfit}")
    for spec, tensor in zip(specs, tensors, strict=False):
        width, batch = spec.axes[1], sample.shape[0]
        if tensor.dim() != len(spec.axes) or tensor.shape[1] != width or tensor.shape[0] not in (1, batch):
            wanted = ", ".join(map(str, (batch, width, *spec.axes[2:])))
            raise EngineError(
                f"{name} takes a {spec.name} of shape ({wanted}), a row per latent, not {tuple(tensor.shape)}: "
                f"{row.misfit}"
            )


def _zeros(spec: TensorSpec, sample: torch.Tensor) -> torch.Tensor:
    """A condition that is not there: zeros that take no memory of their own until a session makes them contiguous."""
    sides = dict(zip(("height", "width"), sample.shape[2:], strict=True))
    axes = [split_axis(axis) if isinstance(axis, str) else (None, axis) for axis in spec.axes[1:]]
    shape = [sides[root] // number if root else number for root, number in axes]
    return torch.zeros((), dtype=spec.torch_dtype, device=sample.device).expand(sample.shape[0], *shape)


def timesteps(module: EngineModule, timestep: torch.Tensor | float | int, sample: torch.Tensor) -> torch.Tensor:
    """The timestep beside the latents as the engine takes it: a scalar, or one for each sample.

    EngineError when samples have different ones, and the engine takes one.
    """
    spec = next(spec for spec in module.session.contract.inputs if spec.name == "timestep")
    if not isinstance(timestep, torch.Tensor):
        timestep = _scalar(timestep, sample)
    if spec.axes:
        return timestep.flatten().to(sample.device).expand(sample.shape[0])
    if timestep.numel() > 1 and not bool((timestep == timestep.flatten()[0]).all()):
        raise EngineError(
            f"{type(module).__name__} takes one timestep for the whole batch, not {timestep.tolist()}: call it once "
            "per timestep, or export the model with --timesteps"
        )
    return timestep.flatten()[0].to(sample.device)


def _scalar(value: float, beside: torch.Tensor) -> torch.Tensor:
    """A number beside a tensor: written by a kernel, where a copy from the host would wait for the GPU in each step."""
    return torch.full((), float(value), dtype=torch.float32, device=beside.device)


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
            "conditioning_scale": _scalar(conditioning_scale, sample),
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
