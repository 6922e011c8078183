"""What a small VAE is held against its teacher by: each loss a row of a table, each by its weight.

TAESD's author (https://github.com/madebyollin/taesd, issues 2 and 11) trains the encoder on the squared error of its
latents alone, and the decoder as a conditional GAN with a little squared error and, since 1.1, LPIPS, since pixel
losses alone blur what the latents do not hold. A GAN needs more steps and care than a small run has, so it is no row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sdkd.core.numbers import Bounds
from sdkd.errors import InputError

if TYPE_CHECKING:
    import torch

Loss = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""A float32 scalar of images [b, 3, h, w] in [-1, 1] and the teacher's."""

_WEIGHT = Bounds(0, 1e6)
_COARSE = 4  # pixels of a side that are averaged


def l1(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of the pixels."""
    return (made - wanted).abs().mean()


def mse(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the pixels."""
    return (made - wanted).square().mean()


def edges(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of the differences between neighbouring pixels, down and across (as the gradient difference
    loss of Mathieu et al. 2016, arXiv 1511.05440, but with their signs): sharpness.
    """
    error = made - wanted
    return error.diff(dim=-2).abs().mean() + error.diff(dim=-1).abs().mean()


def coarse(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of images at a quarter of the size: colours and brightness of areas."""
    from torch.nn import functional as F

    return F.avg_pool2d(made - wanted, _COARSE).abs().mean()


LOSSES: dict[str, Loss | None] = {
    "l1": l1,
    "mse": mse,
    "coarse": coarse,
    "edges": edges,
    "lpips": None,  # made when asked for: its weights must be on this disk
}
DEFAULT = "l1=1,edges=1,coarse=1"


def parse_losses(text: str) -> dict[str, float]:
    """`l1=1,edges=0.5` -> weights by name without those of 0; InputError for an unknown name, or when none is left."""
    found: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, weight = (word.strip() for word in part.partition("="))
        if name not in LOSSES:
            raise InputError(f"loss {name!r} is unknown: choose from {', '.join(LOSSES)}, as in {DEFAULT!r}")
        try:
            found[name] = float(weight)
        except ValueError:
            raise InputError(f"loss {part!r} has no number for a weight: give e.g. {name}=1") from None
        if problem := _WEIGHT.problem(f"weight of the loss {name!r}", found[name]):
            raise InputError(problem)
    if not any(found.values()):
        raise InputError(f"losses {text!r} leave nothing to learn: give e.g. {DEFAULT!r}")
    return {name: weight for name, weight in found.items() if weight}


def make_losses(weights: Mapping[str, float], device: torch.device) -> dict[str, Loss]:
    """The losses by name; NotMeasuredError or InputError as `load_lpips` where that is asked for."""
    return {name: LOSSES[name] or _lpips(device) for name in weights}


def _lpips(device: torch.device) -> Loss:
    from sdkd.core.perceptual import load_lpips

    net: Any = load_lpips().net.to(device)  # frozen; images in [-1, 1]
    return lambda made, wanted: net(made.clamp(-1, 1), wanted.clamp(-1, 1)).mean()
