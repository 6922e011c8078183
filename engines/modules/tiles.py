"""Tiles: an image of any size through an engine of one size, in overlapping parts that are faded into one another.

diffusers' tiled VAE (`AutoencoderKL.tiled_decode`) with two differences. Tiles are all of one size, spread evenly: an
engine need not be built for the narrow rest at the edge. And the parts of a place are averaged by weights that fade
towards each tile's inner edges, which for two neighbours is diffusers' linear blend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import product

import torch

from sdkd.core.profiles import Range

OVERLAP = 0.25  # of a tile, with each neighbour: diffusers' tile_overlap_factor


def fitting_tile(sides: Sequence[tuple[Range, Range]], sizes: tuple[int, int], wanted: int) -> tuple[int, int]:
    """Height and width of the largest tile that an engine takes, at most `wanted` where it can be and at most `sizes`.

    `sides`: each profile's ranges of height and width. An image smaller than every tile keeps its size, for the engine
    to refuse.
    """

    def fit(side: Range, size: int) -> int:
        return min(size, max(side.min, min(wanted, side.max)))

    found = [(fit(height, sizes[0]), fit(width, sizes[1])) for height, width in sides]
    held = [tile for tile, (height, width) in zip(found, sides, strict=True) if tile[0] in height and tile[1] in width]
    return max(held or found, key=math.prod)


def starts(length: int, tile: int, overlap: float = OVERLAP) -> list[int]:
    """Where the tiles of one axis begin: as few as overlap by that fraction, spread evenly from edge to edge."""
    if tile >= length:
        return [0]
    shared = min(tile - 1, math.ceil(tile * overlap))
    count = -(-(length - shared) // (tile - shared))
    return [round(index * (length - tile) / (count - 1)) for index in range(count)]


def in_tiles(
    run: Callable[[torch.Tensor], torch.Tensor],
    tensor: torch.Tensor,
    tile: tuple[int, int],
    scale: Fraction,
    overlap: float = OVERLAP,
) -> torch.Tensor:
    """`run` over tiles of `tensor [batch, channels, height, width]`, put together in float32, in the result's dtype.

    `tile`: height and width in elements of `tensor`; `scale`: by how much `run` enlarges both axes. Sizes, of the tile
    too, are multiples of the scale's denominator.
    """
    step = scale.denominator
    sizes = tensor.shape[-2:]
    rows, columns = (
        [start // step * step for start in starts(size, part, overlap)] for size, part in zip(sizes, tile, strict=True)
    )
    down, across = (
        [weights.to(tensor.device) for weights in fades([int(start * scale) for start in line], int(part * scale))]
        for line, part in ((rows, tile[0]), (columns, tile[1]))
    )
    total, shares = None, torch.zeros([int(size * scale) for size in sizes], device=tensor.device)
    for (row, vertical), (column, horizontal) in product(
        zip(rows, down, strict=True), zip(columns, across, strict=True)
    ):
        part = run(tensor[..., row : row + tile[0], column : column + tile[1]])
        if total is None:
            total = torch.zeros((*part.shape[:-2], *shares.shape), device=part.device)
        share = vertical[:, None] * horizontal[None, :]
        y, x = int(row * scale), int(column * scale)
        total[..., y : y + part.shape[-2], x : x + part.shape[-1]] += part.float() * share
        shares[y : y + part.shape[-2], x : x + part.shape[-1]] += share
    assert total is not None
    return (total / shares).to(part.dtype)


def fades(begins: Sequence[int], tile: int) -> list[torch.Tensor]:
    """Weights along one axis for each tile: 1 inside, linear to 0 over what it shares with a neighbour (blend_v)."""
    found = []
    for index, begin in enumerate(begins):
        weights = torch.ones(tile)
        if index > 0:
            shared = begins[index - 1] + tile - begin
            weights[:shared] *= torch.arange(shared) / shared
        if index + 1 < len(begins):
            shared = begin + tile - begins[index + 1]
            weights[tile - shared :] *= 1 - torch.arange(shared) / shared
        found.append(weights)
    return found
