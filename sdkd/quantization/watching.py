"""Hooks in a UNet that reduce what its layers are given to a few numbers, while a pipeline draws one image."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from sdkd.core.conditions import flat
from sdkd.errors import InputError, ValuesError
from sdkd.quantization.calibration import Call, LayerStatistics

_SAMPLED = 1 << 16  # numbers of a tensor that percentiles are found among
_TAIL = 1e-4  # share of the numbers beyond a percentile, on each side
_PLAIN = ("sample", "timestep", "encoder_hidden_states", "return_dict")


class _Row(NamedTuple):
    """Of one layer in one call, in the order of LayerStatistics' arrays."""

    low: float
    high: float
    low_percentile: float
    high_percentile: float
    out_low: float
    out_high: float


def watched(unet: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers of a UNet, by module path: convolutions and linear ones."""
    return {
        name: module for name, module in unet.named_modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
    }


class Watch:
    """Inside (`with Watch(unet) as watch`) every call of a UNet is noted; memory does not grow with its activations.

    `on_call` is given the number of each call, from 1. ValuesError, which names layer and step, for NaN and infinity;
    InputError for a call with more than tensors, as those with a ControlNet's residuals are.
    """

    def __init__(self, unet: torch.nn.Module, on_call: Callable[[int], None] = lambda number: None) -> None:
        self._unet, self._on_call = unet, on_call
        self._layers = watched(unet)
        self._rows: dict[str, list[_Row]] = {name: [] for name in self._layers}
        self._channels: dict[str, np.ndarray] = {}
        self._groups: dict[str, str] = {}
        self._taken: dict[int, tuple[weakref.ref[torch.Tensor], str]] = {}  # by id, which a later tensor may get
        self._calls: list[tuple[float, dict[str, torch.Tensor]]] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> Watch:
        self._hooks = [
            self._unet.register_forward_pre_hook(self._begin),
            self._unet.register_forward_hook(self._end, with_kwargs=True),
            *(layer.register_forward_hook(self._note(name)) for name, layer in self._layers.items()),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def timesteps(self) -> list[float]:
        """Of every call."""
        return [timestep for timestep, _ in self._calls]

    def statistics(self) -> dict[str, LayerStatistics]:
        """What was seen of the layers that ran, in the order of the module."""
        found = {}
        for name, rows in self._rows.items():
            if rows:
                arrays = (np.array(column, np.float32) for column in zip(*rows, strict=True))
                ranges = dict(zip(_Row._fields, arrays, strict=True))
                found[name] = LayerStatistics(**ranges, channels=self._channels[name], group=self._groups[name])
        return found

    def call(self, number: int) -> Call:
        """What call `number` was given and gave, copied."""
        timestep, tensors = self._calls[number]
        arrays = {name: np.array(tensor.detach().float().cpu().numpy()) for name, tensor in tensors.items()}
        return Call(arrays.pop("sample"), timestep, arrays.pop("text"), arrays.pop("prediction"), arrays)

    def _begin(self, unet: torch.nn.Module, args: tuple[Any, ...]) -> None:
        self._taken.clear()
        self._on_call(len(self._calls) + 1)

    def _end(self, unet: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], answer: Any) -> None:
        given = flat(inspect.signature(unet.forward).bind(*args, **kwargs).arguments)
        extra = {name: value for name, value in given.items() if name not in _PLAIN and value is not None}
        if strange := [name for name, value in extra.items() if not isinstance(value, torch.Tensor)]:
            raise InputError(f"a pipeline gives its UNet {strange[0]}, which is not recorded: calibrate without it")
        plain = {"sample": given["sample"], "text": given["encoder_hidden_states"], "prediction": answer[0]}
        self._calls.append(
            (float(torch.as_tensor(given["timestep"]).flatten()[0]), plain | extra)
        )  # rows have the same

    def _note(self, name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor], torch.Tensor], None]:
        def note(layer: torch.nn.Module, args: tuple[torch.Tensor], answer: torch.Tensor) -> None:
            (given,) = args
            row, channels = _reduced(given.detach(), answer.detach(), 1 if isinstance(layer, torch.nn.Conv2d) else -1)
            if not all(map(math.isfinite, row)):
                raise ValuesError(
                    f"layer {name!r} is given or gives NaN or infinity in step {len(self._calls) + 1}: the weights are "
                    "damaged, or trained in a wider range than this; no scale fits"
                )
            self._rows[name].append(row)
            before = self._channels.get(name)
            self._channels[name] = channels if before is None else np.maximum(before, channels)
            self._groups.setdefault(name, self._first(given, name))

        return note

    def _first(self, given: torch.Tensor, name: str) -> str:
        """The first layer of this call that was given the very same tensor."""
        known, first = self._taken.get(id(given), (None, name))
        if known is not None and known() is given:
            return first
        self._taken[id(given)] = (weakref.ref(given), name)
        return name


def _reduced(given: torch.Tensor, answer: torch.Tensor, axis: int) -> tuple[_Row, np.ndarray]:
    """The numbers of a row, and the largest absolute value of each channel, which lie along `axis`."""
    others = [place for place in range(given.ndim) if place != axis % given.ndim]
    below, above = (given.amin(others), given.amax(others)) if others else (given, given)
    outside = torch.aminmax(answer)
    row = _Row(float(below.min()), float(above.max()), *_tails(given), float(outside.min), float(outside.max))
    return row, torch.maximum(-below, above).float().numpy()


def _tails(given: torch.Tensor) -> tuple[float, float]:
    flat = given.reshape(-1)
    stride = max(len(flat) // _SAMPLED, 1)
    while math.gcd(stride, len(flat)) > 1:  # no divisor of a side: every channel and place has its turn
        stride += 1
    some = flat[::stride].float()
    count = max(round(len(some) * _TAIL), 1)
    return float(some.topk(count, largest=False).values.max()), float(some.topk(count).values.min())
