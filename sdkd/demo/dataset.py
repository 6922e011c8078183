"""The demo's images as a torch data set: drawn when asked for, the same for the same seed and index."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from sdkd.errors import InputError
from sdkd.toyworld.scenes import Scene, caption, held_out_scenes, render, seen_scenes


@lru_cache(maxsize=4)
def _order(seed: int, turn: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, turn]).permutation(count)


class DemoImages(Dataset[dict[str, Any]]):
    """Items {"image": PIL image, "caption": str}.

    Every pass over the scenes comes in another order and with other drawings; `held_out` gives the scenes that are
    never trained on in place of those that may be.
    """

    def __init__(self, count: int | None = None, seed: int = 0, *, held_out: bool = False) -> None:
        self.scenes = held_out_scenes() if held_out else seen_scenes()
        self.count = len(self.scenes) if count is None else count
        if self.count < 1:
            raise InputError(f"count {count} is not a number of images: use 1 or more")
        self.seed = seed

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> Scene:
        """The scene at an index; IndexError outside 0..len-1."""
        if not 0 <= index < self.count:
            raise IndexError(f"index {index} is not in 0..{self.count - 1}")
        turn, place = divmod(index, len(self.scenes))
        return self.scenes[int(_order(self.seed, turn, len(self.scenes))[place])]

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.scene(index)
        return {"image": render(scene, self.seed * 1_000_003 + index), "caption": caption(scene)}
