"""What tells one student from another, as data: what it keeps of a teacher of its family, how it is usually trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

Blocks = tuple[int, ...]  # of one attention: which of the teacher's transformer blocks it keeps, in their order
CROSS_DOWN, DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, UP = "CrossAttnUpBlock2D", "UpBlock2D"
MID, RESNET_MID = "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"  # the second, as diffusers builds it, is one resnet


class LossWeights(NamedTuple):
    """Factors of the three losses: task, output KD, feature KD (the sum over all feature pairs)."""

    task: float
    output: float
    feature: float


def first(*depths: int) -> tuple[Blocks, ...]:
    """The first transformer blocks of each attention of a level, so many as `depths` says."""
    return tuple(tuple(range(depth)) for depth in depths)


@dataclass(frozen=True)
class Transformers:
    """The transformer blocks that a student keeps: for every level those of the attention of every layer it keeps.

    `down` begins with the finest level, `up` with the deepest, as the UNet's blocks do; `mid` is of one attention.
    """

    down: tuple[tuple[Blocks, ...], ...]
    mid: Blocks
    up: tuple[tuple[Blocks, ...], ...]


@dataclass(frozen=True)
class StudentSpec:
    """One student: what it keeps of a teacher with 2 layers per block, and how it is usually trained.

    `family` is the name of its family, `mid_block_type` the class of its middle block in diffusers (None: it has none).
    """

    name: str
    short: str
    family: str
    mid_block_type: str | None
    dropped_levels: int  # deepest levels removed, down and up
    pairs: str  # preset of feature pairs, see sdkd.distill.training.pairs
    weights: LossWeights
    down_layers: tuple[int, ...] = (0,)
    # The last resnet of an up block takes the skip of the next finer level, so it cannot be the one that goes.
    up_layers: tuple[int, ...] = (0, 2)
    transformers: Transformers | None = None  # None: all of the teacher's
