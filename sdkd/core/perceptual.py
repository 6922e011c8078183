"""LPIPS on weights that are on this disk, for comparisons and as a loss: nothing is ever downloaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from sdkd.errors import InputError, SdkdError

ALEXNET = "alexnet-owt-7be5be79.pth"  # under LPIPS, as its authors evaluate it; torchmetrics holds the rest
LPIPS_LEAST_PX = 32  # smaller images vanish in AlexNet's poolings


class NotMeasuredError(SdkdError, LookupError):
    """A metric cannot be measured here: what it lacks and how to get it."""


def load_lpips() -> Any:
    """LPIPS (torchmetrics) of images [n, 3, h, w] in [0, 1] on AlexNet (Zhang et al. 2018), frozen.

    NotMeasuredError without torchmetrics, torchvision, or AlexNet's weights in torch's cache; InputError when those are
    damaged.
    """
    import torch

    need("torchmetrics", "LPIPS")
    need("torchvision", "LPIPS", "pip install torchvision")
    weights = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    if not weights.is_file():
        raise NotMeasuredError(
            "the weights of AlexNet are not on this disk; get them with "
            "`python -c \"import torchvision; torchvision.models.alexnet(weights='DEFAULT')\"`"
        )
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
    except Exception as error:  # whatever reading a foreign file raises
        raise InputError(
            f"AlexNet's weights cannot be loaded ({error}): delete {weights} and get them again"
        ) from error


def need(package: str, metric: str, command: str = "pip install 'sdkd[train]'") -> None:
    """NotMeasuredError unless a package is installed."""
    if importlib.util.find_spec(package) is None:
        raise NotMeasuredError(f"{metric} needs the package {package.replace('_', '-')}; get it with: {command}")
