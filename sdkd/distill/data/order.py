"""Which image comes at which position: every pass in a new order, the same for the same seed, with nothing to carry.

Positions count the samples of a run over all processes: optimizer step s, forward pass a of `accumulation`, process r
of W, row i of a batch of B is position ((s * accumulation + a) * W + r) * B + i. An order answers for any position, so
a resumed run needs no sampler state, and two processes with batch B see what one with batch 2 B sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sdkd.errors import InputError

Indices = NDArray[np.int64]
_NOTHING: tuple[int, Indices] = (-1, np.empty(0, np.int64))  # a pass and its order
WINDOW = 8192  # images of neighbouring shards that are mixed


class Order(Protocol):
    """The index of the image at a position."""

    def index(self, position: int) -> int:
        """The index at a position."""


class Shuffled:
    """All of `count` images in each pass, in a new random order."""

    def __init__(self, count: int, seed: int) -> None:
        if count < 1:
            raise InputError("the data holds no images: give at least one")
        self.count, self.seed = count, seed
        self._drawn = _NOTHING

    def index(self, position: int) -> int:
        """The image at a position."""
        number, place = divmod(position, self.count)
        drawn = self._drawn  # threads may ask at the end of a pass: read it once
        if drawn[0] != number:
            drawn = self._drawn = number, _permutation(self.count, self.seed, number)
        return int(drawn[1][place])


class Bucketed:
    """Batches of images of one bucket: in each pass every bucket is shuffled, cut into batches, and those are shuffled.

    `together` is how many samples share a shape (batch size x processes). What does not fill a batch waits for another
    pass; a bucket with fewer images than that repeats them.
    """

    def __init__(self, buckets: Sequence[Sequence[int]], together: int, seed: int) -> None:
        self.buckets = [np.asarray(bucket, np.int64) for bucket in buckets if len(bucket)]
        if not self.buckets:
            raise InputError("the data holds no images: give at least one")
        self.together, self.seed = together, seed
        self.length = sum(max(len(bucket) // together, 1) for bucket in self.buckets) * together
        self._drawn = _NOTHING

    def index(self, position: int) -> int:
        """The image at a position."""
        number, place = divmod(position, self.length)
        drawn = self._drawn
        if drawn[0] != number:
            drawn = self._drawn = number, self._draw(number)
        return int(drawn[1][place])

    def _draw(self, number: int) -> Indices:
        batches: list[Indices] = []
        for which, bucket in enumerate(self.buckets):
            shuffled = bucket[_permutation(len(bucket), self.seed, number, which)]
            whole = np.resize(shuffled, max(len(bucket) // self.together, 1) * self.together)
            batches += np.split(whole, len(whole) // self.together)
        order = _permutation(len(batches), self.seed, number, len(self.buckets))
        return np.concatenate([batches[place] for place in order])


class Sharded:
    """Whole shards for each process, in a new order in each pass, mixed within a window of neighbouring images.

    `blocks` are the indices of each shard; process `rank` of `world` reads every `world`-th of the shuffled shards.
    Raises InputError when there are fewer shards than processes.
    """

    def __init__(self, blocks: Sequence[range], batch_size: int, rank: int, world: int, seed: int) -> None:
        if len(blocks) < world:
            raise InputError(f"{len(blocks)} tar shards cannot feed {world} processes: write at least {world} shards")
        self.blocks, self.batch_size, self.rank, self.world, self.seed = blocks, batch_size, rank, world, seed
        self._starts = [0]  # own samples before each pass
        self._drawn = _NOTHING

    def index(self, position: int) -> int:
        """The image at a position of this process."""
        batch, row = divmod(position, self.batch_size)
        own = batch // self.world * self.batch_size + row
        while self._starts[-1] <= own:
            self._starts.append(self._starts[-1] + self._length(len(self._starts) - 1))
        number = next(n for n in range(len(self._starts) - 2, -1, -1) if self._starts[n] <= own)
        drawn = self._drawn
        if drawn[0] != number:
            drawn = self._drawn = number, self._draw(number)
        return int(drawn[1][own - self._starts[number]])

    def _shards(self, number: int) -> Indices:
        return _permutation(len(self.blocks), self.seed, number)[self.rank :: self.world]

    def _length(self, number: int) -> int:
        return sum(len(self.blocks[shard]) for shard in self._shards(number))

    def _draw(self, number: int) -> Indices:
        whole = np.concatenate([np.arange(block.start, block.stop) for block in self._blocks(number)])
        windows = [whole[start : start + WINDOW] for start in range(0, len(whole), WINDOW)]
        return np.concatenate(
            [w[_permutation(len(w), self.seed, number, self.rank, place)] for place, w in enumerate(windows)]
        )

    def _blocks(self, number: int) -> list[range]:
        return [self.blocks[shard] for shard in self._shards(number)]


def _permutation(count: int, *seed: int) -> Indices:
    return np.random.default_rng(seed).permutation(count)
