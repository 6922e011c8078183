"""From what was seen of a UNet to the numbers that it is rounded with; the same for ONNX graphs and PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from sdkd.errors import InputError
from sdkd.quantization.calibration import Calibration, LayerStatistics
from sdkd.quantization.scheme import LARGEST, LayerScales, Scheme, kept_reason

_LEAST = 1e-12  # a scale: what is never anything but 0 has one, too
_LEAST_SMOOTH = 1e-5


class _Range(NamedTuple):
    low: float
    high: float


def layer_scales(
    calibration: Calibration, scheme: Scheme, weights: Mapping[str, np.ndarray], *, clip: float = 0.0
) -> dict[str, LayerScales]:
    """What every layer is rounded with; `weights`: by layer, float32 in state-dict shape `[out, in, ...]`.

    Layers that stay float (`kept_reason`) are left out. Those that are given the same tensor share scale and smoothing.
    `clip`: how far ranges of inputs that are not smoothed go from the extremes (0) to the percentiles (1); on the
    demo's teacher 1 makes the error of late steps half as large again, since rare large values matter there.
    InputError for a layer that the calibration did not see, or saw with other channels.
    """
    names = [name for name in weights if kept_reason(name) is None]
    _check(calibration, {name: weights[name] for name in names})
    groups: dict[tuple[str, bool], list[str]] = {}
    for name in names:  # a tensor that a convolution takes, too, is not smoothed there
        groups.setdefault((calibration.layers[name].group, weights[name].ndim == 2), []).append(name)
    found: dict[str, LayerScales] = {}
    for (_, linear), members in groups.items():
        seen = calibration.layers[members[0]]
        alpha = scheme.smooth if linear and scheme.activations != "none" else None
        smooth = None if alpha is None else _smoothing(seen.channels, [weights[name] for name in members], alpha)
        scale, zero = _affine(_input_range(seen, smooth, clip), scheme)
        for name in members:
            out = calibration.layers[name] if scheme.outputs and weights[name].ndim == 4 else None
            out_scale, out_zero = (None, 0) if out is None else _affine(_outputs(out), scheme)
            found[name] = LayerScales(scale, zero, smooth, out_scale, out_zero)
    return {name: found[name] for name in names}


def weight_codes(
    weight: np.ndarray, scales: LayerScales, scheme: Scheme, least: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Codes of a weight `[out, in, ...]`, rounded and clipped, float32 in its shape, and the scale of each `[out]`.

    The weight is multiplied by the smoothing before; codes * scale is what stands for it then. `least`: scales `[out]`
    below which a graph cannot go.
    """
    real = smoothed(weight, scales)
    scale = weight_scale(real, scheme)
    if least is not None:
        scale = np.maximum(scale, least)
    codes = real / scale.reshape(-1, *(1,) * (real.ndim - 1))
    if scheme.activations == "e4m3":
        return to_e4m3(codes), scale
    return np.clip(np.rint(codes), -scheme.weight_limit, scheme.weight_limit), scale


def smoothed(weight: np.ndarray, scales: LayerScales) -> np.ndarray:
    """The weight times its layer's smoothing, float32."""
    real = np.asarray(weight, np.float32)
    return real if scales.smooth is None else real * scales.smooth.astype(np.float32)[None, :]


def weight_scale(real: np.ndarray, scheme: Scheme) -> np.ndarray:
    """The scale of each output channel of a smoothed weight, float32 `[out]`."""
    largest = np.abs(real).reshape(len(real), -1).max(axis=1)
    return np.maximum(largest / np.float32(scheme.weight_limit), np.float32(_LEAST)).astype(np.float32)


def to_e4m3(values: np.ndarray) -> np.ndarray:
    """Numbers rounded to the nearest E4M3 (ties to even), the largest of which is 448, as float32."""
    import ml_dtypes

    limit = LARGEST["e4m3"]
    return np.clip(values, -limit, limit).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def _check(calibration: Calibration, weights: Mapping[str, np.ndarray]) -> None:
    for name, weight in weights.items():
        seen = calibration.layers.get(name)
        wanted = int(np.prod(weight.shape[1:2]))
        if seen is None or len(seen.channels) != wanted:
            what = "did not see it" if seen is None else f"saw {len(seen.channels)} input channels"
            raise InputError(
                f"layer {name!r} has {wanted} input channels, and the calibration {what}: it is of another model; "
                "calibrate again"
            )


def _smoothing(channels: np.ndarray, weights: list[np.ndarray], alpha: float) -> np.ndarray:
    """SmoothQuant's factor of each input channel, float32; 1 where the input or all weights are 0."""
    largest = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0)
    usable = (channels > 0) & (largest > 0)
    known = np.where(usable, channels, 1.0) ** alpha / np.where(usable, largest, 1.0) ** (1 - alpha)
    return np.where(usable, np.maximum(known, _LEAST_SMOOTH), 1.0).astype(np.float32)


def _input_range(seen: LayerStatistics, smooth: np.ndarray | None, clip: float) -> _Range:
    low, high = float(seen.low.min()), float(seen.high.max())
    if smooth is None:
        rare = float(seen.low_percentile.min()) - low, float(seen.high_percentile.max()) - high
        return _Range(low + clip * rare[0], high + clip * rare[1])
    # Only the largest absolute value of a channel is known, and the extremes of them all.
    below, above = (np.minimum(seen.channels, max(limit, 0.0)) / smooth for limit in (-low, high))
    return _Range(-float(below.max()), float(above.max()))


def _outputs(seen: LayerStatistics) -> _Range:
    return _Range(float(seen.out_low.min()), float(seen.out_high.max()))


def _affine(found: _Range, scheme: Scheme) -> tuple[float, int]:
    """Scale and zero point; 0 is always a code, since convolutions pad with it."""
    low, high = min(found.low, 0.0), max(found.high, 0.0)
    if scheme.activations == "u8":
        scale = max((high - low) / LARGEST["u8"], _LEAST)
        return float(np.float32(scale)), min(max(round(-low / scale), 0), LARGEST["u8"])
    limit = LARGEST[scheme.activations] if scheme.activations != "none" else 1
    return float(np.float32(max(-low, high) / limit or _LEAST)), 0
