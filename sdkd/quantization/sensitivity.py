"""How much rounding changes what a UNet predicts: of all layers, of each alone, and which stay float for that."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sdkd.core.conditions import nested
from sdkd.core.console import Progress, quiet, within
from sdkd.errors import InputError
from sdkd.quantization.calibration import Call
from sdkd.quantization.fake import fake_quantized
from sdkd.quantization.scheme import LayerScales, Scheme

Errors = list[tuple[float, float]]
"""Of each call its timestep, and the L2 norm of the prediction's difference over that of the float prediction."""

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
"""What a UNet is given: latents, timesteps, text, and other tensors by name."""

_SIDE = 16  # of latents, at most, where each layer's part in the error is estimated
_ROWS = 3  # calls that it is estimated with: the first, the middle and the last timestep
_SUMS = 8  # random sums of the prediction; more make the estimate more exact


@dataclass(frozen=True)
class Choice:
    """Which layers stay float and why, and the errors before (all rounded) and after.

    `sensitivity`: as the function gives it. `holds`: whether every error is within the limit now.
    """

    float_layers: Mapping[str, str]
    before: Errors
    after: Errors
    holds: bool
    sensitivity: Mapping[str, float]


@torch.no_grad()
def prediction_error(unet: torch.nn.Module, calls: Sequence[Call]) -> Errors:
    """How far the UNet, as it is, is from the recorded float predictions."""
    found = []
    for call in calls:
        wanted = torch.from_numpy(call.prediction)
        found.append((call.timestep, float((_answer(unet, call) - wanted).norm() / wanted.norm().clamp(min=1e-12))))
    return found


def sensitivity(
    unet: torch.nn.Module,
    calls: Sequence[Call],
    scales: Mapping[str, LayerScales],
    scheme: Scheme,
    progress: Progress = quiet,
) -> dict[str, float]:
    """About the mean squared relative error of the prediction when one layer alone is rounded, by layer.

    To first order, which costs a few runs of the UNet and not one for each layer: what rounding changes in a layer's
    output is projected on the gradients of random sums of the prediction, whose mean square is the change's norm. On
    the middles of a few of the calls' latents, and of guided calls on the half with the prompt.
    """
    found: dict[str, list[torch.Tensor]] = {name: [] for name in scales}
    with torch.inference_mode(False), torch.enable_grad():  # leaves of a graph are no tensors of inference
        for number, rows in enumerate(groups := _together([_small(call) for call in _spread(calls)])):
            squares = _first_order(unet, rows, scales, scheme, within(progress, *_part(number, len(groups))))
            for name, each in squares.items():
                found[name].append(each)
    return {name: float(torch.cat(each).mean()) for name, each in found.items()}


def _part(number: int, count: int) -> tuple[float, float]:
    return number / count, (number + 1) / count


def _first_order(
    unet: torch.nn.Module, rows: Rows, scales: Mapping[str, LayerScales], scheme: Scheme, progress: Progress
) -> dict[str, torch.Tensor]:
    """By layer the squared relative error of each row."""
    changes: dict[str, torch.Tensor] = {}
    probes: dict[str, torch.Tensor] = {}

    def probed(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor], torch.Tensor], torch.Tensor]:
        def probe(layer: torch.nn.Module, args: tuple[torch.Tensor], answer: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), fake_quantized(unet, scales, scheme, [name]):
                changes[name] = layer.forward(*args) - answer
            probes[name] = torch.zeros_like(answer, requires_grad=True)
            return answer + probes[name]

        return probe

    progress("sensitivity of all layers", 0.0)
    hooks = [unet.get_submodule(name).register_forward_hook(probed(name)) for name in scales]
    try:
        answer = _run(unet, *rows)
    finally:
        for hook in hooks:
            hook.remove()
    total = {name: torch.zeros(len(answer)) for name in scales}
    generator = torch.Generator().manual_seed(0)
    for number in range(_SUMS):
        progress("sensitivity of all layers", (number + 1) / (_SUMS + 1))
        weights = torch.randn(answer.shape, generator=generator)
        gradients = torch.autograd.grad(answer, list(probes.values()), weights, retain_graph=number + 1 < _SUMS)
        for name, gradient in zip(probes, gradients, strict=True):
            total[name] += (gradient * changes[name]).flatten(1).float().sum(1).square().cpu() / _SUMS
    norm = answer.detach().flatten(1).square().sum(1).clamp(min=1e-12)
    return {name: square / norm for name, square in total.items()}


def choose(
    unet: torch.nn.Module,
    calls: Sequence[Call],
    scales: Mapping[str, LayerScales],
    scheme: Scheme,
    limit: float,
    most: int,
    progress: Progress = quiet,
) -> Choice:
    """Give the most sensitive layers back to float, at most `most` and no more than needed, until no error is above
    `limit`.

    InputError when there is no call to measure with.
    """
    if not calls:
        raise InputError("the calibration holds no calls to measure the error with: calibrate again")
    progress("error with all layers rounded", 0.0)
    with fake_quantized(unet, scales, scheme):
        before = prediction_error(unet, calls)
    single = sensitivity(unet, calls, scales, scheme, progress)
    if _holds(before, limit) or not most:
        return Choice({}, before, before, _holds(before, limit), single)
    order = sorted(single, key=lambda name: -single[name])
    tried: dict[int, Errors] = {0: before}

    def holds(count: int) -> bool:
        if count not in tried:
            progress(f"error with {count} layers in float", None)
            with fake_quantized(unet, scales, scheme, order[count:]):
                tried[count] = prediction_error(unet, calls)
        return _holds(tried[count], limit)

    count = _fewest(holds, min(most, len(order)))
    reasons = {
        name: f"rounded alone it changes the prediction by about {100 * math.sqrt(single[name]):.2g} %"
        for name in order[:count]
    }
    return Choice(reasons, before, tried[count], holds(count), single)


def _fewest(holds: Callable[[int], bool], most: int) -> int:
    """The least count that holds, or `most` where none does; 0 does not."""
    low, high = 0, 1
    while high < most and not holds(high):
        low, high = high, 2 * high
    high = min(high, most)
    if not holds(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _holds(errors: Errors, limit: float) -> bool:
    return all(relative <= limit for _, relative in errors)  # not of NaN


def _spread(calls: Sequence[Call]) -> list[Call]:
    ordered = sorted(calls, key=lambda call: -call.timestep)
    places = {round(place * (len(ordered) - 1) / (_ROWS - 1)) for place in range(_ROWS)}
    return [ordered[place] for place in sorted(places)]


def _small(call: Call) -> Call:
    """The last row of a call (with the prompt, where there are others), the middle of its latents."""
    height, width = call.sample.shape[2:]
    top, left = max(height - _SIDE, 0) // 2, max(width - _SIDE, 0) // 2
    part = slice(top, top + _SIDE), slice(left, left + _SIDE)
    cut, shown = call.sample[-1:, :, *part], call.prediction[-1:, :, *part]
    return Call(cut, call.timestep, call.text[-1:], shown, {name: array[-1:] for name, array in call.extra.items()})


def _together(calls: Sequence[Call]) -> list[Rows]:
    """Calls of equal shapes as one: the UNet takes a timestep for each row."""
    groups: dict[object, list[Call]] = {}
    for call in calls:
        groups.setdefault((call.sample.shape, call.text.shape, tuple(call.extra)), []).append(call)
    return [_rows(group) for group in groups.values()]


def _rows(calls: Sequence[Call]) -> Rows:
    sample, text = (torch.from_numpy(np.concatenate([getattr(c, k) for c in calls])) for k in ("sample", "text"))
    timesteps = torch.tensor([call.timestep for call in calls for _ in range(len(call.sample))])
    extra = {name: torch.from_numpy(np.concatenate([call.extra[name] for call in calls])) for name in calls[0].extra}
    return sample, timesteps, text, extra


def _answer(unet: torch.nn.Module, call: Call) -> torch.Tensor:
    return _run(unet, *_rows([call]))


def _run(
    unet: torch.nn.Module,
    sample: torch.Tensor,
    timesteps: torch.Tensor,
    text: torch.Tensor,
    extra: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """The prediction in float32 on the CPU, computed where the UNet is and in its dtype."""
    like = next(unet.parameters())
    given = nested({name: tensor.to(like) for name, tensor in extra.items()})
    answer: torch.Tensor = unet(sample.to(like), timesteps.to(like.device), text.to(like), **given, return_dict=False)[
        0
    ]
    return answer.float().cpu()
