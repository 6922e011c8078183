"""How numbers of a UNet are rounded to eight bits, as a target takes them, and which layers stay float."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

Activations = Literal["u8", "s8", "e4m3", "none"]
LARGEST = {"u8": 255, "s8": 127, "e4m3": 448}  # codes: u8 from 0 with a zero point, the others symmetric around 0


@dataclass(frozen=True)
class Scheme:
    """Rounding of weights (per output channel, symmetric) and of what layers are given (per tensor).

    `activations`: `u8` (affine, with a zero point), `s8` (symmetric), `e4m3` (symmetric; the weights, too) or `none`
    (weights alone). `weight_bits`: 7 where the CPU multiplies without VNNI, whose 16-bit sums of two products overflow
    with 8. `outputs`: round what convolutions give, too, since ONNX Runtime has no other 8-bit convolution. `smooth`:
    SmoothQuant's alpha for linear layers (arXiv 2211.10438, equation 4), None for none.
    """

    activations: Activations
    weight_bits: int = 8
    outputs: bool = False
    smooth: float | None = None

    @property
    def weight_limit(self) -> int:
        """The largest code of a weight: 127, 63 with seven bits, 448 for E4M3."""
        return LARGEST["e4m3"] if self.activations == "e4m3" else 2 ** (self.weight_bits - 1) - 1

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `Scheme(**data)` reads it back."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class LayerScales:
    """What a layer is rounded with; real = (code - zero point) * scale.

    `smooth` `[channels]`: the input is divided by it channel by channel, and the weight multiplied. `out_scale` and
    `out_zero_point`: of what a convolution gives, where the scheme rounds that.
    """

    scale: float
    zero_point: int = 0
    smooth: np.ndarray | None = None
    out_scale: float | None = None
    out_zero_point: int = 0


# Layers that stay float, by pattern of their module path, and why. Peers keep the same ones, but for proj_out.
KEPT_FLOAT: tuple[tuple[str, str], ...] = (
    (r"(^|\.)(time_embedding|time_emb_proj|add_embedding)(\.|$)", "a vector per image: no time to gain"),
    (r"^conv_in$", "4 channels in: no time to gain, and the noise itself passes"),
    (r"^conv_out$", "4 channels out: no time to gain, and the prediction itself passes"),
    (r"\.conv_shortcut$", "carries the residual stream, whose range is wide, past the norms"),
)


def kept_reason(layer: str) -> str | None:
    """Why a layer stays float by default; None for one that is rounded."""
    return next((reason for pattern, reason in KEPT_FLOAT if re.search(pattern, layer)), None)
