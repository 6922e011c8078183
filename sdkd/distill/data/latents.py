"""What the trainer draws its batches from: posteriors of images, and text embeddings of captions.

The VAE encoder costs more than a teacher step: encoding the same images in every step would waste a third of the work,
so few images are encoded once, before training, and many by `sdkd cache`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from sdkd.core.console import Progress, quiet
from sdkd.core.contract import check_size, size_multiple, vae_scale
from sdkd.distill.data.buckets import Sizes, View, fit
from sdkd.distill.data.encode import Given, TextParts, encode_captions, encode_image, together
from sdkd.distill.data.reader import Reader
from sdkd.distill.data.rows import CaptionedImages, row_caption

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline

_TEXT_LIMIT = 1 << 30  # bytes of text embeddings that are kept


@runtime_checkable
class Latents(Protocol):
    """Posteriors of images, scaled as the UNet sees them, with their captions.

    May also offer `sizes(index)`, what SDXL is told of an image; without, an image is whole (see `sizes_of`).
    """

    @property
    def captions(self) -> Sequence[str]:
        """The caption of each image."""

    def __len__(self) -> int: ...

    def posterior(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation [c, h, w]."""

    def text(self, index: int) -> Given | None:
        """Stored text embeddings, of the empty caption for index -1; None where only captions are stored."""


@dataclass(frozen=True)
class LatentCache:
    """Latents in memory."""

    mean: torch.Tensor  # [n, c, h, w]
    std: torch.Tensor  # [n, c, h, w]
    captions: Sequence[str]
    unreadable: Mapping[int, str] = field(default_factory=dict)  # images that could not be read, by index
    views: Sequence[Sizes] = ()  # what each is told to be, where that is known

    def __len__(self) -> int:
        return len(self.captions)

    def posterior(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation [c, h, w] of one image."""
        return self.mean[index], self.std[index]

    def sizes(self, index: int) -> Sizes | None:
        """What SDXL is told of one image; None where nothing is known."""
        return self.views[index] if self.views else None

    def text(self, index: int) -> None:
        """None: only captions are kept here."""


def sizes_of(latents: Latents, index: int, scale: int, *view: bool) -> Sizes:
    """What SDXL is told of an image: as the latents know it, else that it is whole; `scale`: pixels per latent.

    `view`: True for the mirrored image, of latents that have such.
    """
    known = getattr(latents, "sizes", None)
    if known and (found := known(index, *view)):
        sizes: Sizes = found
        return sizes
    height, width = (scale * int(side) for side in latents.posterior(index)[0].shape[-2:])
    return height, width, 0, 0, height, width


def training_size(pipe: StableDiffusionPipeline, resolution: int | None) -> int:
    """Side of the training images in pixels: as asked, else the teacher's own; InputError unless it fits the model."""
    size = resolution or int(pipe.unet.config.sample_size or 64) * vae_scale(pipe.vae.config)
    check_size(size, size, size_multiple(pipe.unet.config, pipe.vae.config))
    return size


def encode_images(
    vae: AutoencoderKL,
    images: CaptionedImages,
    *,
    size: int,
    limit: int | None = None,
    workers: int = 4,
    progress: Progress = quiet,
) -> LatentCache:
    """Encode images with a VAE, on its device and in its dtype; the first `limit` of them, or all.

    One that cannot be read is replaced by the next and named in `unreadable`. Raises InputError when there are none,
    TrainingError when more than 1 % cannot be read.
    """
    count = min(len(images), limit or len(images))

    def load(position: int, index: int) -> tuple[View, str]:
        row = images[index]
        return fit(row["image"], size, size), row_caption(row, index)

    reader = Reader(load, count, workers=workers)
    means, stds, captions, views = [], [], [], []
    for index, ((pixels, sizes), caption) in reader.rows((index, index) for index in range(count)):
        if index % 16 == 0:
            progress(f"encoding image {index + 1} of {count}", index / count)
        mean, std = encode_image(vae, pixels)
        means.append(mean.cpu())
        stds.append(std.cpu())
        captions.append(caption)
        views.append(sizes)
    return LatentCache(torch.stack(means), torch.stack(stds), captions, reader.unreadable, views)


class TextEmbeddings:
    """Text embeddings of captions; those seen before are kept in memory as long as they fit."""

    def __init__(self, parts: TextParts, kept: int = _TEXT_LIMIT) -> None:
        self.parts, self._kept = parts, kept
        self.limit = parts.limit  # tokens
        self.cut: set[str] = set()  # captions that had more
        self._known: dict[str, Given] = {}
        self._bytes = 0

    @property
    def dtype(self) -> torch.dtype:
        """The text encoders'."""
        found: torch.dtype = self.parts.encoders[0].dtype
        return found

    def __call__(self, captions: Sequence[str]) -> Given:
        """Embeddings of b captions, in the text encoders' dtype, on their device."""
        new = [text for text in dict.fromkeys(captions) if text not in self._known]
        made = encode_captions(self.parts, new) if new else {}
        found = {text: {name: value[row] for name, value in made.items()} for row, text in enumerate(new)}
        self.cut.update(self.parts.too_long(new))
        for text, values in found.items():
            self._keep(text, values)
        return together(torch.stack, [found[text] if text in found else self._known[text] for text in captions])

    def _keep(self, text: str, values: Given) -> None:
        if self._bytes < self._kept:
            self._known[text] = {name: value.clone() for name, value in values.items()}
            self._bytes += sum(value.nbytes for value in values.values())
