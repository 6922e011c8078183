"""Which image comes at which position, and what is random about it: hanging on the run's seed and the position alone.

Positions count the samples of a run over all processes: optimizer step s, forward pass a of `accumulation`, process r
of W, row i of a batch of B is position ((s * accumulation + a) * W + r) * B + i. An order answers for any position and
every sample has random numbers of its own: nothing is carried from sample to sample, so a resumed run needs no state,
and two processes with batch B see and draw what one with batch 2 B does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sdkd.errors import InputError

Indices = NDArray[np.int64]
WINDOW = 8192  # images of neighbouring shards that are mixed
# Streams of random numbers apart from the one for everything else: crop and flip, dropout, guidance.
_VIEW, DROPOUT, _GUIDANCE = 1, 2, 3


class Order:
    """All of `length` images in each pass, in a new random order: the index of the image at a position."""

    def __init__(self, length: int, seed: int) -> None:
        if length < 1:
            raise InputError("the data holds no images: give at least one")
        self.length, self.seed = length, seed
        self._drawn: tuple[int, Indices] = (-1, np.empty(0, np.int64))  # a pass and its order

    def index(self, position: int) -> int:
        """The index at a position."""
        number, place = self._place(position)
        drawn = self._drawn  # threads may ask at the end of a pass: read it once
        if drawn[0] != number:
            drawn = self._drawn = number, self._draw(number)
        return int(drawn[1][place])

    def _place(self, position: int) -> tuple[int, int]:
        """Number of the pass, and the place in it."""
        return divmod(position, self.length)

    def _draw(self, number: int) -> Indices:
        return _permutation(self.length, self.seed, number)


class Bucketed(Order):
    """Batches of images of one bucket: in each pass every bucket is shuffled, cut into batches, and those are shuffled.

    `together` is how many samples share a shape (batch size x processes). What does not fill a batch waits for another
    pass; a bucket with fewer images than that repeats them.
    """

    def __init__(self, buckets: Sequence[Sequence[int]], together: int, seed: int) -> None:
        self.buckets = [np.asarray(bucket, np.int64) for bucket in buckets if len(bucket)]
        self.together = together
        super().__init__(sum(max(len(bucket) // together, 1) for bucket in self.buckets) * together, seed)

    def _draw(self, number: int) -> Indices:
        batches: list[Indices] = []
        for which, bucket in enumerate(self.buckets):
            shuffled = bucket[_permutation(len(bucket), self.seed, number, which)]
            whole = np.resize(shuffled, max(len(bucket) // self.together, 1) * self.together)
            batches += np.split(whole, len(whole) // self.together)
        order = _permutation(len(batches), self.seed, number, len(self.buckets))
        return np.concatenate([batches[place] for place in order])


class Sharded(Order):
    """Whole shards for each process, in a new order in each pass, mixed within a window of neighbouring images.

    `blocks` are the indices of each shard; process `rank` of `world` reads every `world`-th of the shuffled shards.
    Raises InputError when there are fewer shards than processes.
    """

    def __init__(self, blocks: Sequence[range], batch_size: int, rank: int, world: int, seed: int) -> None:
        if len(blocks) < world:
            raise InputError(f"{len(blocks)} tar shards cannot feed {world} processes: write at least {world} shards")
        super().__init__(sum(map(len, blocks)), seed)
        self.blocks, self.batch_size, self.rank, self.world = blocks, batch_size, rank, world
        self._starts = [0]  # own samples before each pass

    def _place(self, position: int) -> tuple[int, int]:
        batch, row = divmod(position, self.batch_size)
        own = batch // self.world * self.batch_size + row
        while self._starts[-1] <= own:
            self._starts.append(self._starts[-1] + sum(map(len, self._shards(len(self._starts) - 1))))
        number = next(n for n in range(len(self._starts) - 2, -1, -1) if self._starts[n] <= own)
        return number, own - self._starts[number]

    def _shards(self, number: int) -> list[range]:
        shuffled = _permutation(len(self.blocks), self.seed, number)
        return [self.blocks[shard] for shard in shuffled[self.rank :: self.world]]

    def _draw(self, number: int) -> Indices:
        whole = np.concatenate([np.arange(block.start, block.stop) for block in self._shards(number)])
        windows = [whole[start : start + WINDOW] for start in range(0, len(whole), WINDOW)]
        return np.concatenate(
            [w[_permutation(len(w), self.seed, number, self.rank, place)] for place, w in enumerate(windows)]
        )


def _permutation(count: int, *seed: int) -> Indices:
    return np.random.default_rng(seed).permutation(count)


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


def guidance_at(seed: int, position: int, low: float, high: float) -> float:
    """The guidance w of the sample at a position, evenly drawn from low to high."""
    return low + (high - low) * float(torch.rand(1, generator=generator_at(seed, position, _GUIDANCE)))


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
