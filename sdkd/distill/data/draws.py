"""What is random about one sample, drawn from a generator of its own that is seeded by the run's seed and its position.

Nothing is carried from sample to sample: a resumed run, and one that is spread over more processes, draws the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

# Streams of random numbers apart from the one for everything else: crop and flip, and dropout.
_VIEW, DROPOUT = 1, 2


@dataclass(frozen=True)
class Draw:
    """Choices for one sample that do not need its latents; `generator` goes on with posterior and noise."""

    timestep: int
    empty: bool  # caption dropped
    other: float | None  # random conditioning: place (0 to 1) among all images of the one whose caption is taken
    generator: torch.Generator


def generator_at(seed: int, position: int, stream: int = 0) -> torch.Generator:
    """A CPU generator for one position; neighbouring positions and seeds are unrelated."""
    state = np.random.SeedSequence([seed, position, stream]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))


def view_generator(seed: int, position: int) -> torch.Generator:
    """The generator for crop and flip, which are drawn where the image is read."""
    return generator_at(seed, position, _VIEW)


def mirrored_at(seed: int, position: int) -> bool:
    """Whether a run with `flip` and no random crop mirrors the image at a position: `fit_pixels` draws the same."""
    return float(torch.rand(1, generator=view_generator(seed, position))) < 0.5


def draw_at(
    seed: int, position: int, *, together: int, timesteps: int, caption_dropout: float, random_conditioning: float
) -> Draw:
    """The choices at a position.

    Timesteps are stratified: `together` neighbouring samples (batch size x processes) get one each of as many equal
    parts of the schedule of `timesteps` steps, for less variance (as in k-diffusion's stratified sampling).
    """
    generator = generator_at(seed, position)
    jitter, drop, swap, place = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    timestep = int((position % together + jitter) / together * timesteps)
    return Draw(timestep, drop < caption_dropout, place if swap < random_conditioning else None, generator)


def draw_latents(draw: Draw, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Latents [c, h, w] float32 on the CPU from a posterior's mean and standard deviation [c, h, w]."""
    noise = torch.randn(mean.shape, generator=draw.generator)
    return mean.float() + std.float() * noise


def draw_noise(draw: Draw, shape: torch.Size, offset: float = 0.0) -> torch.Tensor:
    """Noise [c, h, w] float32; `offset` adds a constant per channel (Guttenberg 2023, offset noise)."""
    noise = torch.randn(shape, generator=draw.generator)
    if offset:
        noise = noise + offset * torch.randn((shape[0], 1, 1), generator=draw.generator)
    return noise
