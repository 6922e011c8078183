"""The optimization profiles of an engine: which one a call takes, and how large its batch may be."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sdkd.core.profiles import Range

TEXT = "sequence"  # the work goes by images or latents, though text may have more elements


class Profiles(tuple[Mapping[str, Range], ...]):
    """Ranges of each dynamic axis (in the contract's units), profile by profile in the engine's order."""

    __slots__ = ()

    def pick(self, sizes: Mapping[str, int]) -> int | None:
        """The profile that holds all sizes and has the smallest largest images; None when none holds them."""
        fitting = [index for index in range(len(self)) if self._holds(index, sizes)]
        return min(fitting, key=self._volume, default=None)

    def largest_batch(self, sizes: Mapping[str, int]) -> int | None:
        """The largest batch of the profiles that hold these other sizes; None when none does."""
        others = {axis: size for axis, size in sizes.items() if axis != "batch"}
        return max((self[index]["batch"].max for index in range(len(self)) if self._holds(index, others)), default=None)

    def _holds(self, index: int, sizes: Mapping[str, int]) -> bool:
        return all(size in self[index][axis] for axis, size in sizes.items())

    def _volume(self, index: int) -> int:
        ranges = self[index]
        axes = [axis for axis in ranges if axis != TEXT] if any("height" in axis for axis in ranges) else list(ranges)
        return math.prod(ranges[axis].max for axis in axes)
