"""How often a pipeline draws what the caption says, as named by the reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from sdkd.errors import InputError
from sdkd.toyworld.reader import ATTRIBUTES, Reading, read_image
from sdkd.toyworld.scenes import Scene, caption, parse_caption


@dataclass(frozen=True)
class CaptionAccuracy:
    """Shares (0 to 1) of images that show each attribute as asked, and what was read in each image."""

    scenes: tuple[Scene, ...]
    readings: tuple[Reading, ...]

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.scenes)

    @property
    def right(self) -> dict[str, int]:
        """Attribute -> number of images that show it as asked."""
        agreed = [reading.agrees(scene) for scene, reading in zip(self.scenes, self.readings, strict=True)]
        return {name: sum(one[name] for one in agreed) for name in ATTRIBUTES}

    @property
    def accuracy(self) -> dict[str, float]:
        """Attribute -> share of images that show it as asked."""
        return {name: right / self.count for name, right in self.right.items()}


def draw(
    pipe: Any, scenes: Sequence[Scene], steps: int, guidance_scale: float, seed: int, batch_size: int
) -> list[Image.Image]:
    """One image per scene; noise comes from the seed and the place in the list, whatever the batch size."""
    import torch

    images: list[Image.Image] = []
    for start in range(0, len(scenes), batch_size):
        batch = scenes[start : start + batch_size]
        images += pipe(
            [caption(scene) for scene in batch],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed + start + place) for place in range(len(batch))],
        ).images
    return images


def evaluate_captions(
    pipe: Any,
    scenes: Sequence[Scene],
    steps: int = 25,
    guidance_scale: float = 4.0,
    seed: int = 0,
    batch_size: int = 32,
) -> CaptionAccuracy:
    """Draw every scene's caption with a Stable Diffusion pipeline and read the images; InputError without scenes."""
    if not scenes or batch_size < 1:
        raise InputError(f"{len(scenes)} scenes in batches of {batch_size}: both numbers must be 1 or more")
    images = draw(pipe, scenes, steps, guidance_scale, seed, batch_size)
    return CaptionAccuracy(tuple(scenes), tuple(read_image(image) for image in images))


JUDGED = ("shape", "colour", "background")  # size and position have hardly been learnt by the embedded teacher


def judge_captions(images: Sequence[Image.Image], captions: Sequence[str]) -> dict[str, float]:
    """Attribute of JUDGED -> share of images that show it as their caption says; InputError for other captions."""
    found = CaptionAccuracy(tuple(map(parse_caption, captions)), tuple(map(read_image, images)))
    return {name: found.accuracy[name] for name in JUDGED}


def are_captions(texts: Sequence[str]) -> bool:
    """Whether all texts are captions of the demo's world, so that the reader can judge their images."""
    try:
        return bool([parse_caption(text) for text in texts])
    except InputError:
        return False
