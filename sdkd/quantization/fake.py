"""A PyTorch UNet that computes as an eight-bit engine does: for choosing layers, for gates, and for training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch.nn import functional

from sdkd.errors import InputError
from sdkd.quantization.calibration import Calibration
from sdkd.quantization.scales import layer_scales
from sdkd.quantization.scheme import LARGEST, LayerScales, Scheme
from sdkd.quantization.watching import watched

_LEAST = 1e-12  # as sdkd.quantization.scales has it


def unet_scales(unet: torch.nn.Module, calibration: Calibration, scheme: Scheme) -> dict[str, LayerScales]:
    """What the layers of a UNet are rounded with."""
    weights = {name: unet.get_parameter(f"{name}.weight").detach().float().cpu().numpy() for name in watched(unet)}
    return layer_scales(calibration, scheme, weights)


@contextlib.contextmanager
def fake_quantized(
    unet: torch.nn.Module, scales: Mapping[str, LayerScales], scheme: Scheme, layers: Collection[str] | None = None
) -> Iterator[None]:
    """Inside, `layers` (None: all of `scales`) round inputs, weights and, where asked, outputs; afterwards as before.

    The module's parameters and their names stay what they are, and gradients pass straight through the rounding, zero
    where it clips. Scales of weights follow the weights; what a frozen weight (`requires_grad` off) is rounded to is
    kept as long as it does not change. InputError for a layer that the UNet or `scales` lacks.
    """
    names = list(scales if layers is None else layers)
    modules = {name: _layer(unet, name, scales) for name in names}
    before: dict[str, Any] = {name: module.__dict__.get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.forward = _Rounding(module, scales[name], scheme)
        yield
    finally:
        for name, module in modules.items():
            del module.forward
            if before[name] is not None:
                module.forward = before[name]


def _layer(unet: torch.nn.Module, name: str, scales: Mapping[str, LayerScales]) -> torch.nn.Module:
    found = None
    with contextlib.suppress(AttributeError):
        found = unet.get_submodule(name)
    if name not in scales or not isinstance(found, torch.nn.Conv2d | torch.nn.Linear):
        what = "has no scales" if name not in scales else "is no convolution or linear layer of this UNet"
        raise InputError(f"layer {name!r} {what}: calibrate this model")
    return found


class _Rounding:
    """A layer's forward with rounding."""

    def __init__(self, layer: Any, scales: LayerScales, scheme: Scheme) -> None:
        self._layer = layer
        self._scales, self._scheme = scales, scheme
        smooth = None if scales.smooth is None else torch.from_numpy(scales.smooth).float()
        self._smooth = None if smooth is None else smooth.to(layer.weight.device)
        self._kept: tuple[tuple[int, int], torch.Tensor] | None = None

    def __call__(self, given: torch.Tensor) -> torch.Tensor:
        layer, scales, scheme = self._layer, self._scales, self._scheme
        real = given.float() if self._smooth is None else given.float() / self._smooth
        if scheme.activations != "none":
            real = _rounded(real, scales.scale, scales.zero_point, scheme)
        real, weight = real.to(given.dtype), self._weight()
        if isinstance(layer, torch.nn.Conv2d):
            answer: torch.Tensor = layer._conv_forward(real, weight, layer.bias)
        else:
            answer = functional.linear(real, weight, layer.bias)
        if scales.out_scale is None:
            return answer
        return _rounded(answer.float(), scales.out_scale, scales.out_zero_point, scheme).to(answer.dtype)

    def _weight(self) -> torch.Tensor:
        weight: torch.Tensor = self._layer.weight
        if weight.requires_grad:
            return self._rounded_weight(weight)
        now = weight.data_ptr(), weight._version
        if self._kept is None or self._kept[0] != now:
            with torch.no_grad():
                self._kept = now, self._rounded_weight(weight)
        return self._kept[1]

    def _rounded_weight(self, weight: torch.Tensor) -> torch.Tensor:
        limit = self._scheme.weight_limit
        real = weight.float() if self._smooth is None else weight.float() * self._smooth
        scale = (real.detach().abs().flatten(1).amax(1) / limit).clamp(min=_LEAST)
        if self._scheme.activations == "e4m3":
            found = _e4m3(real, scale.view(-1, *(1,) * (real.ndim - 1)))
        else:
            zero = torch.zeros(len(scale), dtype=torch.int32, device=scale.device)
            found = torch.fake_quantize_per_channel_affine(real, scale, zero, 0, -limit, limit)
        return found.to(weight.dtype)


def _rounded(values: torch.Tensor, scale: float, zero: int, scheme: Scheme) -> torch.Tensor:
    """Float32 values rounded as a tensor is: one scale for all."""
    limit = LARGEST[scheme.activations]
    if scheme.activations == "e4m3":
        return _e4m3(values, scale)
    least = 0 if scheme.activations == "u8" else -limit
    return torch.fake_quantize_per_tensor_affine(values, scale, zero, least, limit)


def _e4m3(values: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    apply: Callable[[torch.Tensor, torch.Tensor | float], torch.Tensor] = _E4M3.apply
    return apply(values, scale)


class _E4M3(torch.autograd.Function):
    """To the nearest E4M3 and back, in units of a scale; torch's own cast makes NaN of what is above 448."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
        limit = LARGEST["e4m3"]
        codes = values / scale
        ctx.save_for_backward(codes.abs() <= limit * (1 + 1e-6))
        return codes.clamp(-limit, limit).to(torch.float8_e4m3fn).to(values.dtype) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None
