"""What the trainer draws its batches from: latents and text embeddings, made once before training.

The VAE encoder costs more than a teacher step: encoding the same images in every step would waste a third of the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sdkd.console import Progress, quiet
from sdkd.contract import check_size, size_multiple, vae_scale
from sdkd.distill.data import CaptionedImages, to_pixels
from sdkd.errors import InputError

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

_TEXT_LIMIT = 1 << 30  # bytes of text embeddings that are kept; beyond, captions are encoded in each step


@dataclass(frozen=True)
class LatentCache:
    """Posteriors of n images, scaled as the UNet sees them, and their captions."""

    mean: torch.Tensor  # [n, c, h, w] float32
    std: torch.Tensor  # [n, c, h, w] float32
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def sample(self, indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Latents [b, c, h, w] drawn from the posteriors of `indices` [b]."""
        mean, std = self.mean[indices], self.std[indices]
        return mean + std * torch.randn(mean.shape, generator=generator)


def training_size(pipe: StableDiffusionPipeline, resolution: int | None) -> int:
    """Side of the training images in pixels: as asked, else the teacher's own; InputError unless it fits the model."""
    size = resolution or int(pipe.unet.config.sample_size or 64) * vae_scale(pipe.vae.config)
    check_size(size, size, size_multiple(pipe.unet.config, pipe.vae.config))
    return size


@torch.no_grad()
def encode_images(
    pipe: StableDiffusionPipeline,
    images: CaptionedImages,
    *,
    size: int,
    device: torch.device | str = "cpu",
    batch_size: int = 16,
    limit: int | None = None,
    progress: Progress = quiet,
) -> LatentCache:
    """Encode images with the pipeline's VAE in float32; the first `limit` of them, all with None.

    Raises InputError when there are none or one cannot be read.
    """
    count = min(len(images), limit or len(images))
    if count == 0:
        raise InputError("the data holds no images: give at least one")
    vae = pipe.vae
    home, dtype = vae.device, vae.dtype
    torch.nn.Module.to(vae, device, torch.float32)  # torch's own: diffusers' warns about every change of dtype
    means, stds, captions = [], [], []
    try:
        for start in range(0, count, batch_size):
            progress(f"encoding image {start + 1} of {count}", start / count)
            rows = [images[index] for index in range(start, min(start + batch_size, count))]
            pixels = torch.stack([to_pixels(row["image"], size) for row in rows]).to(device)  # [b, 3, size, size]
            posterior = vae.encode(pixels).latent_dist
            means.append(posterior.mean.cpu())
            stds.append(posterior.std.cpu())
            captions += [str(row["caption"]) for row in rows]
    finally:
        torch.nn.Module.to(vae, home, dtype)
    scale = float(vae.config.scaling_factor)
    return LatentCache(torch.cat(means) * scale, torch.cat(stds) * scale, captions)


class TextEmbeddings:
    """Text embeddings of captions by index; kept in memory when they fit, else made when asked for."""

    def __init__(
        self, pipe: StableDiffusionPipeline, captions: Sequence[str], device: torch.device | str = "cpu"
    ) -> None:
        unique = {text: index for index, text in enumerate(dict.fromkeys(["", *captions]))}
        self._rows = torch.tensor([unique[text] for text in captions])
        self._ids = _tokens(pipe, list(unique))
        self._encoder, self._device = pipe.text_encoder, torch.device(device)
        size = len(unique) * self._ids.shape[1] * pipe.text_encoder.config.hidden_size * 4
        self._table = self._encode_all() if size <= _TEXT_LIMIT else None

    def __call__(self, indices: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
        """Embeddings [b, s, d] float32 of the captions at `indices` [b], of the empty one where `empty` [b] is true."""
        rows = self._rows[indices].masked_fill(empty, 0)
        if self._table is not None:
            return self._table[rows].to(self._device)
        return self._encode(self._ids[rows])

    @torch.no_grad()
    def _encode(self, ids: torch.Tensor) -> torch.Tensor:
        output: Any = self._encoder(ids.to(self._encoder.device))
        return output[0].float().to(self._device)

    def _encode_all(self) -> torch.Tensor:
        return torch.cat([self._encode(ids).cpu() for ids in self._ids.split(64)])


def _tokens(pipe: StableDiffusionPipeline, captions: list[str]) -> torch.Tensor:
    """Token ids [n, s] int64, padded and cut to the length that the text encoder was trained with."""
    tokenizer = pipe.tokenizer
    found = tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    ids: torch.Tensor = found.input_ids
    return ids
