"""What the record of an int8 or fp8 engine says of its rounding: which layers, how good, how fast."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NotRequired, TypedDict

from sdkd.core.schema import construct, problem

# Of a record's flags.
CALIBRATION_FILE = "calibration/unet.safetensors"  # of a bundle; recorded again for the asking, and known by digest
KEYS = ("quantization", "rounded_layers", "float_layers", "quality", "sensitivity", "speed")


@dataclass(frozen=True)
class Asked:
    """How it was to be rounded: a `sdkd.quantization.scheme.Scheme` as JSON, and the calibration's SHA-256."""

    scheme: Mapping[str, Any]
    calibration: str = ""


@dataclass(frozen=True)
class StepError:
    """At a timestep the L2 norm of the prediction's difference over that of the float prediction."""

    timestep: float
    relative: float


@dataclass(frozen=True)
class Quality:
    """Errors by timestep of the UNet rounded in PyTorch and of the engine (None: it did not run where it was built).

    `image_psnr_db`: of whole images against float ones. `limit`: the largest error that the build accepts.
    """

    simulated: tuple[StepError, ...]
    engine: tuple[StepError, ...] | None = None
    image_psnr_db: tuple[float, ...] | None = None
    limit: float | None = None

    @property
    def errors(self) -> tuple[StepError, ...]:
        """The engine's own where they are known, else the simulated ones."""
        return self.simulated if self.engine is None else self.engine

    @property
    def worst(self) -> float | None:
        """The largest error of any timestep; None where there is none."""
        return max((row.relative for row in self.errors), default=None)

    @property
    def kept(self) -> bool:
        """Whether there are errors, and none is above the limit."""
        return self.worst is not None and self.limit is not None and self.worst <= self.limit


@dataclass(frozen=True)
class Speed:
    """How many times as fast as the engine in half precision a UNet call was, and the calls' seconds by precision."""

    against: str
    times: float
    seconds: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


class _Flags(TypedDict):
    quantization: Asked
    rounded_layers: NotRequired[int]  # as the rest, of a UNet whose activations are rounded
    float_layers: NotRequired[dict[str, str]]
    quality: NotRequired[Quality]
    sensitivity: NotRequired[dict[str, float]]
    speed: NotRequired[Speed | None]


@dataclass(frozen=True)
class Quantized:
    """All of it; of an engine whose weights alone are rounded `asked` alone.

    `rounded_layers`: how many; None where it is not known. `float_layers`: why each of them stays float. `sensitivity`:
    by layer about the squared relative error of the prediction when that layer alone is rounded; empty where it was not
    recorded.
    """

    asked: Asked
    float_layers: Mapping[str, str]
    quality: Quality
    sensitivity: Mapping[str, float]
    speed: Speed | None = None
    rounded_layers: int | None = None

    @staticmethod
    def of(flags: Mapping[str, Any]) -> Quantized | None:
        """From the flags of an engine's record, which `flags_problem` finds right; None for an engine in float."""
        if "quantization" not in flags:
            return None
        quality, speed = flags.get("quality", {"simulated": ()}), flags.get("speed")
        return Quantized(
            asked=construct(flags["quantization"], Asked),
            float_layers=dict(flags.get("float_layers", {})),
            quality=construct(quality, Quality),
            sensitivity=dict(flags.get("sensitivity", {})),
            speed=None if speed is None else construct(speed, Speed),
            rounded_layers=flags.get("rounded_layers"),
        )

    @property
    def light(self) -> bool:
        """Whether weights alone are rounded, so that there is no gate but the comparison with the graph."""
        return not self.quality.simulated and self.quality.engine is None

    @property
    def reasons(self) -> dict[str, int]:
        """Why layers stay float, and how many for each reason; figures of single layers are left out of it."""
        return dict(Counter(re.sub(r" by (about )?[\d.e+-]+ ?%$", "", reason) for reason in self.float_layers.values()))

    @property
    def ranking(self) -> list[tuple[str, float]]:
        """Layers by sensitivity, the largest first."""
        return sorted(self.sensitivity.items(), key=lambda item: -item[1])

    @property
    def median_seconds(self) -> dict[str, float]:
        """Of a UNet call, by precision."""
        seconds = self.speed.seconds if self.speed else {}
        return {name: statistics.median(rows) for name, rows in seconds.items() if rows}


def flags_problem(flags: Mapping[str, Any]) -> str | None:
    """What is wrong with the flags of an engine's record (as JSON) where they speak of rounding; None for nothing.

    What this version does not know in them is left alone.
    """
    if "quantization" not in flags:
        return None
    given = {name: flags[name] for name in KEYS if name in flags}
    for name, shape in {"quantization": Asked, "quality": Quality, "speed": Speed}.items():
        if isinstance(value := given.get(name), dict):
            given[name] = {key: value[key] for key in (each.name for each in fields(shape)) if key in value}
    return problem(given, _Flags, "flags")
