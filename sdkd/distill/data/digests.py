"""What a run trains on, in a few bytes: enough to tell another model or other data when it goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

import torch

from sdkd.core.images import to_rgb
from sdkd.distill.data.latents import Latents
from sdkd.distill.data.rows import CaptionedImages
from sdkd.errors import InputError

_VALUES = 64  # of each weight
_ROWS, _CAPTIONS = 16, 1024  # spread evenly over the data


def model_digest(parts: Iterable[torch.nn.Module], scheduler: Any, dtype: torch.dtype) -> str:
    """Digest of some values of every weight of a model's parts, as they are in `dtype`, and of the noise schedule."""
    public = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(public, sort_keys=True, default=str).encode())
    for part in parts:
        for name, value in sorted(part.state_dict().items()):
            digest.update(f"{name} {list(value.shape)}".encode())
            digest.update(_bytes(value.to(dtype) if value.numel() <= _VALUES else _some(value).to(dtype)))
    return digest.hexdigest()


def data_digest(data: CaptionedImages | Latents) -> str:
    """Digest of how many rows there are, of some images or latents, and of many captions."""
    digest = hashlib.sha256(str(len(data)).encode())
    if isinstance(data, Latents):
        for index in _spread(len(data), _ROWS):
            for value in data.posterior(index):
                digest.update(_bytes(value))
        captions = [data.captions[index] for index in _spread(len(data), _CAPTIONS)]
    else:
        digest.update(fingerprint(data).encode())
        quick = getattr(data, "caption", None)
        captions = [_caption(quick, index) for index in _spread(len(data), _CAPTIONS)] if quick else []
    digest.update(json.dumps(captions).encode())
    return digest.hexdigest()


def fingerprint(images: CaptionedImages) -> str:
    """Digest of some rows, evenly spread: enough to tell one data set from another."""
    digest = hashlib.sha256()
    for index in _spread(len(images), _ROWS):
        try:
            row = images[index]
            digest.update(f"{row['caption']} {row['image'].size}".encode() + to_rgb(row["image"]).tobytes())
        except InputError:
            digest.update(b"unreadable")
    return digest.hexdigest()


def _spread(count: int, most: int) -> list[int]:
    return sorted({count * place // most for place in range(most)}) if count else []


def _caption(read: Callable[[int], str], index: int) -> str:
    try:
        return str(read(index))
    except InputError:
        return "unreadable"


def _some(value: torch.Tensor) -> torch.Tensor:
    flat = value.detach().reshape(-1)
    return flat[:: max(flat.numel() // _VALUES, 1)]


def _bytes(value: torch.Tensor) -> bytes:
    return value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
