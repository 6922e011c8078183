"""What was seen of a UNet while it drew: ranges of every layer, a few calls and some images, in one file.

The file is safetensors: `ranges/LAYER` [6, steps], `channels/LAYER` [in channels], `calls/NUMBER/INPUT`, `images`, all
float32, and under one key of its metadata (more would come in any order) JSON that says the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from sdkd.core.documents import parse_json
from sdkd.core.files import write_bytes
from sdkd.errors import ModelError

SCHEMA = 1
BESIDE_UNET = "calibration.safetensors"  # in the UNet's folder of a model that was trained with rounding
_KEY = "sdkd-calibration"
_RANGES = ("low", "high", "low_percentile", "high_percentile", "out_low", "out_high")
_INPUTS = ("sample", "text", "prediction")


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Of one layer; float32 arrays `[steps]` per denoising step (UNet call of an image), over all images.

    `low`, `high`: extremes of its input. `low_percentile`, `high_percentile`: of each call, their mean. `channels`
    `[in channels]`: the largest absolute value. `out_low`, `out_high`: extremes of its output. `group`: the first layer
    that is given the very same tensor.
    """

    low: np.ndarray
    high: np.ndarray
    low_percentile: np.ndarray
    high_percentile: np.ndarray
    channels: np.ndarray
    out_low: np.ndarray
    out_high: np.ndarray
    group: str


@dataclass(frozen=True, eq=False)
class Call:
    """A UNet call as a pipeline makes it; float32 arrays.

    `sample` `[n, channels, h, w]`, `text` `[n, sequence, width]`, `extra`: other tensors by the UNet's argument names
    (`timestep_cond`), `prediction` `[n, out channels, h, w]`: what the float model answers.
    """

    sample: np.ndarray
    timestep: float
    text: np.ndarray
    prediction: np.ndarray
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)


class _Call(TypedDict):
    timestep: float
    extra: list[str]


class _Header(TypedDict):
    schema: int
    weights: str
    about: dict[str, Any]
    groups: dict[str, str]
    calls: list[_Call]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics by layer, recorded calls, and the final latents `[n, channels, h, w]` of the first images.

    `weights`: digest of the UNet's weights. `about`: JSON; prompts, seeds, steps, guidance scale, scheduler, size.
    """

    weights: str
    about: Mapping[str, Any]
    layers: Mapping[str, LayerStatistics]
    calls: tuple[Call, ...]
    images: np.ndarray

    @cached_property
    def content(self) -> bytes:
        """The file's bytes; equal for equal content."""
        from safetensors.numpy import save

        header = {
            "schema": SCHEMA,
            "weights": self.weights,
            "about": dict(self.about),
            "groups": {name: layer.group for name, layer in self.layers.items()},
            "calls": [{"timestep": float(call.timestep), "extra": sorted(call.extra)} for call in self.calls],
        }
        tensors = {name: np.ascontiguousarray(array, np.float32) for name, array in self._tensors().items()}
        return save(tensors, {_KEY: json.dumps(header, allow_nan=False)})

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.content).hexdigest()

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_bytes(path, self.content)

    @staticmethod
    def load(path: Path) -> Calibration:
        """Read such a file; ModelError when it is missing, damaged or none."""
        from sdkd.models.safetensors_file import Weights

        what = f"calibration {str(path)!r}"
        try:
            weights = Weights.open(path)
            if _KEY not in weights.metadata:
                raise ModelError(f"{what} is no calibration: calibrate again")
            header = parse_json(weights.metadata[_KEY].encode(), _Header, strict=True)
            if header["schema"] != SCHEMA:
                raise ModelError(f"{what} has schema {header['schema']}, {SCHEMA} is read: calibrate again")
            tensors = {name: tensor.read().numpy() for name, tensor in weights.tensors.items()}
            if wrong := [name for name, array in tensors.items() if not np.isfinite(array).all()]:
                raise ValueError(f"{wrong[0]} is not finite")
            return _of(header, tensors)
        except KeyError as error:
            raise ModelError(f"{what} lacks {error}: calibrate again") from error
        except ValueError as error:  # ModelError is one
            raise error if str(error).startswith(what) else ModelError(f"{what}: {error}; calibrate again") from error

    def _tensors(self) -> dict[str, np.ndarray]:
        found = {"images": self.images}
        for name, layer in self.layers.items():
            found[f"ranges/{name}"] = np.stack([getattr(layer, kind) for kind in _RANGES])
            found[f"channels/{name}"] = layer.channels
        for number, call in enumerate(self.calls):
            given = {kind: getattr(call, kind) for kind in _INPUTS} | {f"extra/{k}": v for k, v in call.extra.items()}
            found |= {f"calls/{number}/{kind}": array for kind, array in given.items()}
        return found


def _of(header: _Header, tensors: Mapping[str, np.ndarray]) -> Calibration:
    """KeyError for a tensor that is not there, ValueError for one of another shape."""
    layers = {}
    for name, group in header["groups"].items():
        rows, channels = tensors[f"ranges/{name}"], tensors[f"channels/{name}"]
        if rows.ndim != 2 or len(rows) != len(_RANGES) or channels.ndim != 1:
            raise ValueError(f"statistics of layer {name} have the shapes {rows.shape} and {channels.shape}")
        layers[name] = LayerStatistics(**dict(zip(_RANGES, rows, strict=True)), channels=channels, group=group)
    calls = []
    for number, call in enumerate(header["calls"]):
        sample, text, prediction = (tensors[f"calls/{number}/{kind}"] for kind in _INPUTS)
        if sample.ndim != 4 or text.ndim != 3 or prediction.shape[2:] != sample.shape[2:]:
            raise ValueError(f"call {number} has the shapes {sample.shape}, {text.shape} and {prediction.shape}")
        extra = {kind: tensors[f"calls/{number}/extra/{kind}"] for kind in call["extra"]}
        calls.append(Call(sample, call["timestep"], text, prediction, extra))
    return Calibration(header["weights"], header["about"], layers, tuple(calls), tensors["images"])
