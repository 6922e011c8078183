"""CMMD: distance of two sets of images by their CLIP embeddings (Jayasumana et al. 2023, arXiv 2401.09603).

    MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y),  k(a, b) = exp(-|a - b|^2 / (2 sigma^2)),  times 1000

on unit-length image embeddings of CLIP ViT-L/14 at 336 pixels, sigma 10. The paper takes the unbiased estimate (pairs
of one image with itself left out), the authors' published code (google-research/cmmd) the biased one; here are both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from sdkd.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

SIGMA = 10.0
SCALE = 1000.0
_BLOCK = 1024  # rows of a kernel matrix that are in memory at once
_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images
_STD = (0.26862954, 0.26130258, 0.27577711)


def cmmd(one: torch.Tensor, other: torch.Tensor, *, unbiased: bool = True) -> float:
    """CMMD of embeddings [n, d] and [m, d]; computed in float64, since three means near 1 cancel.

    The unbiased estimate may be slightly negative for equal distributions. InputError with fewer than 2 rows.
    """
    if min(len(one), len(other)) < 2:
        raise InputError(f"CMMD of {len(one)} and {len(other)} images: give at least 2 of each")
    x, y = one.double(), other.double()
    return SCALE * (_own(x, unbiased) + _own(y, unbiased) - 2 * _kernel_sum(x, y) / (len(x) * len(y)))


def _own(x: torch.Tensor, unbiased: bool) -> float:
    count = len(x)
    if unbiased:
        return (_kernel_sum(x, x) - count) / (count * (count - 1))  # the diagonal: exp(0) each
    return _kernel_sum(x, x) / count**2


def _kernel_sum(x: torch.Tensor, y: torch.Tensor) -> float:
    total = 0.0
    for rows in x.split(_BLOCK):
        squared = rows.square().sum(1)[:, None] + y.square().sum(1)[None] - 2 * rows @ y.T
        total += float(torch.exp(-squared.clamp(min=0) / (2 * SIGMA**2)).sum())
    return total


@torch.no_grad()
def clip_embeddings(model: Any, images: Iterable[Image], batch_size: int = 16) -> torch.Tensor:
    """Unit-length image embeddings [n, d] float32 of a transformers CLIPModel.

    Images are cut square about their middle and resized with bicubic interpolation, without antialiasing, to the
    model's size, as in the authors' code.
    """
    size = int(model.config.vision_config.image_size)
    found, stream = [], iter(images)
    while part := list(itertools.islice(stream, batch_size)):
        pixels = torch.cat([_pixels(image, size) for image in part])
        states = model.vision_model(pixel_values=pixels.to(model.device, model.dtype)).pooler_output
        found.append(F.normalize(model.visual_projection(states).float(), dim=-1).cpu())
    return torch.cat(found)


def _pixels(image: Image, size: int) -> torch.Tensor:
    """float32 [1, 3, size, size], normalised as CLIP wants it."""
    import numpy as np

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    array = np.asarray(image.convert("RGB").crop((left, top, left + side, top + side)), dtype=np.float32) / 255
    square = F.interpolate(torch.from_numpy(array).permute(2, 0, 1)[None], size=(size, size), mode="bicubic")
    return (square - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_STD)[:, None, None]
