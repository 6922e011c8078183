"""Small pictures of latents while an image is drawn: a linear map to colours, fitted to the model's own decoder.

Every VAE has its own latents, so the map is found once for each: some smooth noise is decoded, and each latent's
colours are those of its pixels on average, by least squares.
"""

from __future__ import annotations

import io
from typing import Any

import torch
from torch.nn import functional as F

_COARSE = (2, 4, 8)  # latents a side that noise is smoothed over
_SAMPLES = 2


class Preview:
    """The map of one pipeline's latents `[batch, channels, height, width]` to colours."""

    def __init__(self, pipe: Any, height: int, width: int) -> None:
        """Fit it at a size (pixels) that the decoder takes."""
        config, scale = pipe.vae.config, pipe.vae_scale_factor
        shape = (_SAMPLES, int(config.latent_channels), height // scale, width // scale)
        latents = _smooth(shape)
        unscaled = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        with torch.no_grad():
            pixels = pipe.vae.decode(unscaled.to(pipe.vae.dtype), return_dict=False)[0].float().cpu()
        colours = F.adaptive_avg_pool2d(pixels, (shape[2], shape[3]))
        self.matrix = torch.linalg.lstsq(_rows(latents), colours.movedim(1, -1).reshape(-1, colours.shape[1])).solution

    def png(self, latents: torch.Tensor) -> bytes:
        """A PNG of the first of these latents, one pixel a latent.

        Schedulers keep noise at its own scale, far from 1 in the first steps of some: what is wider is brought to 1.
        """
        from PIL import Image

        one = latents[:1].float().cpu()
        one = one / one.std().clamp(min=1.0)
        colours = (_rows(one) @ self.matrix).reshape(*one.shape[-2:], -1)
        values = ((colours / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, format="PNG", compress_level=1)
        return buffer.getvalue()


def _smooth(shape: tuple[int, int, int, int]) -> torch.Tensor:
    """Noise that is alike over areas of several widths, as images are, of standard deviation 1."""
    generator = torch.Generator().manual_seed(0)
    found = torch.zeros(shape)
    for coarse in _COARSE:
        small = torch.randn(*shape[:2], *(max(1, side // coarse) for side in shape[2:]), generator=generator)
        found += F.interpolate(small, shape[2:], mode="bilinear")
    return found / found.std()


def _rows(latents: torch.Tensor) -> torch.Tensor:
    """One row for each latent: its channels and a one."""
    rows = latents.movedim(1, -1).reshape(-1, latents.shape[1])
    return torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
