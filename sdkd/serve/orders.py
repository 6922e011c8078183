"""A request that was found to be drawable: checked against its model, its engines and the limits, all in numbers."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from engines.generate.drawing import Settings
from engines.generate.image_inputs import Inputs, PipelineKind, find_kind, resized, with_defaults
from sdkd.core.contract import check_size
from sdkd.core.numbers import DRAWING, SEED, SHARE, check_number, check_numbers
from sdkd.core.profiles import ShapeRanges
from sdkd.errors import InputError, RangeError
from sdkd.models.generation import Generation
from sdkd.models.schedulers import check_steps, scheduler_class
from sdkd.serve.catalog import Catalog, Served
from sdkd.serve.errors import TooLargeError, UnknownNameError
from sdkd.serve.uploads import read_images
from sdkd.serve.wanted import LORA_STRENGTH, Limits, LoraWish, Wanted

if TYPE_CHECKING:
    from PIL.Image import Image

CHANCE = 2**32  # seeds drawn by chance, as other front ends draw them


@dataclass(frozen=True)
class Order:
    """What one request has drawn: image i of `n` has the seed `seed` + i, and all else in common."""

    served: Served
    settings: Settings
    prompt: str
    negative_prompt: str | None
    scheduler: str | None  # diffusers' class; None: the one that the model comes with
    seed: int
    n: int
    loras: tuple[LoraWish, ...]
    images: Mapping[str, Image]  # by input, in the size to draw

    @property
    def key(self) -> tuple[object, ...]:
        """What images must have in common to be drawn in one call."""
        run = self.settings
        numbers = run.height, run.width, run.steps, run.guidance_scale, tuple(sorted(run.scales.items()))
        given = run.kind.task, tuple(sorted(self.images)), self.negative_prompt is None
        return (self.served.id, *numbers, *given, self.scheduler, self.loras)

    @property
    def about(self) -> dict[str, str]:
        """The settings of its images but their seeds, as PNGs carry them."""
        run = self.settings
        loras = ", ".join(f"{lora.name}:{lora.strength:g}" for lora in self.loras)
        values = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "steps": run.steps,
            "guidance_scale": run.guidance_scale,
            "size": f"{run.height}x{run.width}",
            "scheduler": self.scheduler or self.served.own_scheduler,
            "model": self.served.name,
            "target": self.served.target,
            **run.scales,
            "loras": loras or None,
        }
        return {key: str(value) for key, value in values.items() if value is not None}


def make_order(wanted: Wanted, catalog: Catalog, limits: Limits, loras: Mapping[str, Path]) -> Order:
    """Check a request, and read and resize its images; takes milliseconds, with large images more.

    Raises UnknownNameError for a model or LoRA that is not there, TooLargeError for images beyond the limit, RangeError
    for a size that the engine was not built for, InputError for anything else that cannot be drawn.
    """
    served = catalog.find(wanted.model)
    _check_numbers(wanted, limits)
    _check_loras(wanted.loras, limits, loras)
    run = served.generation.with_asked(wanted.steps, wanted.guidance_scale, wanted.scheduler)
    check_number("steps", run.steps, 1, max(limits.steps, served.generation.steps), whole=True)
    negative = wanted.negative_prompt or None
    height, width = _size(wanted, served, limits)
    _check_scheduler(run)
    kind, inputs = _kind(wanted, served, negative, run.steps)
    read = read_images(wanted.image, wanted.mask, limits)
    inputs, _ = resized(replace(inputs, images=read), height, width)
    seed = random.SystemRandom().randrange(CHANCE) if wanted.seed is None else wanted.seed
    check_number("seed of the last image", seed + wanted.n - 1, SEED.low, SEED.high, whole=True)
    settings = Settings(height, width, run.steps, run.guidance_scale, kind, inputs.scales)
    return Order(served, settings, wanted.prompt, negative, run.scheduler, seed, wanted.n, wanted.loras, inputs.images)


def _check_numbers(wanted: Wanted, limits: Limits) -> None:
    check_numbers(
        {name: getattr(wanted, name) for name in ("height", "width", "steps", "guidance_scale", "seed", "strength")},
        {**DRAWING, "strength": SHARE},
    )
    check_number("n", wanted.n, 1, limits.n, whole=True)
    for name in ("prompt", "negative_prompt"):
        text = getattr(wanted, name) or ""
        if len(text) > limits.prompt_characters:
            raise InputError(
                f"{name} has {len(text)} characters, and this server takes {limits.prompt_characters}: shorten it"
            )
        if any(0xD800 <= ord(letter) < 0xE000 for letter in text):
            raise InputError(f"{name} holds half of a surrogate pair, which is no character: send UTF-8")


def _check_loras(wishes: tuple[LoraWish, ...], limits: Limits, loras: Mapping[str, Path]) -> None:
    for wish in wishes:
        check_numbers({"strength of a LoRA": wish.strength}, {"strength of a LoRA": LORA_STRENGTH})
        if wish.name not in loras:
            names = ", ".join(loras) or "none: start it with --lora-dir FOLDER"
            raise UnknownNameError(f"LoRA {wish.name!r} is not on this server (it has {names})")
    if len({wish.name for wish in wishes}) < len(wishes):
        raise InputError("a LoRA is asked for twice: give each once, with one strength")
    if len(wishes) > limits.loras:
        raise InputError(f"{len(wishes)} LoRAs are asked for, and this server adds {limits.loras} at once: fuse some")


def _size(wanted: Wanted, served: Served, limits: Limits) -> tuple[int, int]:
    """Height and width; a single one that is given is that of a square."""
    usual = served.size
    one = wanted.height or wanted.width
    height, width = (wanted.height or one or usual[0]), (wanted.width or one or usual[1])
    check_size(height, width, served.multiple)
    if height * width > limits.pixels:
        raise TooLargeError(
            f"{width}x{height} pixels (width x height) are more than this server draws ({limits.pixels}): ask for less"
        )
    if served.ranges and not any(height in r.height and width in r.width for r in served.ranges):
        raise RangeError(_out_of_range(served, served.ranges, height, width))
    return height, width


def _out_of_range(served: Served, ranges: tuple[ShapeRanges, ...], height: int, width: int) -> str:
    built = "; or ".join(f"width {r.width}, height {r.height}" for r in ranges)
    size = f"{height}x{width}"
    # By its name here: who asks need not know where the server keeps its models.
    command = f"sdkd build-engine {served.name} --target {served.target} --size {size} --output FOLDER"
    return (
        f"{width}x{height} pixels (width x height) are outside what model {served.id!r} was built for ({built}): "
        f"ask for such a size, or build engines for it: {command}"
    )


@functools.lru_cache(256)
def _check_scheduler(run: Generation) -> None:
    if run.scheduler is not None:
        check_steps(scheduler_class(run.scheduler)(), run.steps)


def _kind(wanted: Wanted, served: Served, negative: str | None, steps: int) -> tuple[PipelineKind, Inputs]:
    """The pipeline that draws it, and what is given, images not yet read, with all scales."""
    names = [name for name in ("image", "mask") if getattr(wanted, name) is not None]
    if names == ["mask"]:
        raise InputError("mask has no image to act on: send image, too")
    task = names[-1] if names else "text"
    if task not in served.takes:
        can = {"text": "a prompt alone", "image": "an image", "mask": "an image with a mask"}
        ways = " or ".join(can[name] for name in served.takes)
        raise InputError(
            f"model {served.id!r} cannot draw from {can[task]}: it takes {ways}"
            + ("" if served.channels != 4 or task == "text" else " (build its vae_encoder, too)")
        )
    given = Inputs({name: Path(name) for name in names}, {}, _strength(wanted))
    kind = find_kind(served.id, served.source.unet_config, given, negative)
    return kind, with_defaults(given, kind, steps)


def _strength(wanted: Wanted) -> dict[str, float]:
    return {} if wanted.strength is None else {"strength": wanted.strength}
