"""Drawing a request in batches: each image with a generator of its own, written as soon as its batch is done."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.generate.image_inputs import TEXT, Inputs, PipelineKind, done_steps
from engines.generate.long_prompts import arguments, limit_of
from sdkd.core.components import guidance_copies
from sdkd.core.conditions import guidance_width
from sdkd.core.console import Progress, within
from sdkd.core.contract import Contract
from sdkd.core.files import write_bytes
from sdkd.core.images import check_finite
from sdkd.core.numbers import DRAWING, SEED, check_number, check_numbers
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.models.schedulers import seed_scheduler

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo


OnStep = Callable[[int, Any], None]
"""Called after a step with the number of steps done and the latents."""


@dataclass(frozen=True)
class Settings:
    """What the images of one pipeline call have in common; sizes in pixels."""

    height: int
    width: int
    steps: int
    guidance_scale: float
    kind: PipelineKind = TEXT
    scales: Mapping[str, float] = field(default_factory=dict)
    parts: int = 1  # in which prompts are read: see engines.generate.long_prompts

    @property
    def guided(self) -> bool:
        """Whether the UNet sees every image more than once a step."""
        return self.guidance_scale > 1 and self.scales.get("image_guidance_scale", 1.0) >= 1

    @property
    def done_steps(self) -> int:
        """How many of the steps are done: a strength leaves the first ones out."""
        return done_steps(self.scales, self.steps)


@dataclass(frozen=True)
class Picture:
    """One image to draw, and what it starts from by input (`image`, `mask`, `control`), in the size to draw."""

    prompt: str
    negative_prompt: str | None
    seed: int
    images: Mapping[str, Image] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What to draw; sizes in pixels, image i uses seed + i and the prompts in turn. InputError for odd numbers."""

    prompts: tuple[str, ...]
    negative_prompt: str | None
    height: int
    width: int
    steps: int
    guidance_scale: float
    seed: int
    count: int
    kind: PipelineKind = TEXT
    inputs: Inputs = field(default_factory=Inputs)
    parts: int = 1
    cache_interval: int = 1  # of the UNet: see sdkd.models.step_caching

    def __post_init__(self) -> None:
        check_numbers({**self.inputs.scales, **vars(self)}, DRAWING)
        check_number("seed of the last image", self.seed + self.count - 1, SEED.low, SEED.high, whole=True)

    def prompt(self, index: int) -> str:
        """The prompt of an image."""
        return self.prompts[index % len(self.prompts)]

    @property
    def settings(self) -> Settings:
        """What all of its images have in common."""
        size = self.height, self.width
        return Settings(*size, self.steps, self.guidance_scale, self.kind, self.inputs.scales, self.parts)

    def picture(self, index: int) -> Picture:
        """One of its images."""
        return Picture(self.prompt(index), self.negative_prompt, self.seed + index, self.inputs.images)


def engine_batch(pipe: Any, settings: Settings) -> Range:
    """Images per call that the UNet's engine was built for, at the size of a request; 1 without engine or profile."""
    session = getattr(pipe.unet, "session", None)
    if session is None:
        return Range.fixed(1)
    return batch_range(session.contract, session.checked.record.profiles, settings, limit_of(pipe))


def batch_range(contract: Contract, profiles: Sequence[ShapeRanges], settings: Settings, limit: int) -> Range:
    """As `engine_batch`, for a UNet's contract and profiles; `limit`: tokens that the text encoder takes at once.

    An engine's batch holds all copies that guidance stacks; without guidance they are room for more images.
    """
    copies = guidance_copies(contract)
    used = copies if settings.guided else 1
    fixed = contract.inputs[0].axes[0]
    if isinstance(fixed, int):
        return Range.fixed(max(1, fixed // used))
    tokens = settings.parts * limit
    fitting = [
        profile.batch
        for profile in profiles
        if settings.height in profile.height and settings.width in profile.width and tokens in profile.sequence
    ]
    if not fitting:
        return Range.fixed(1)
    low, high = min(r.min for r in fitting), max(r.max for r in fitting) * copies // used
    return Range(low, low, high)


def in_batches(indices: Sequence[int], size: int) -> list[list[int]]:
    """The images in groups of `size`, the last one smaller where they do not come out even."""
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]


def draw(pipe: Any, request: Request, indices: Sequence[int], report: Progress, at_least: int = 1) -> list[Image]:
    """Some images of a request in one call, each of its own seed; `at_least` as in `draw_pictures`."""
    settings = request.settings
    first, last = indices[0] + 1, indices[-1] + 1
    which = f"image {first}" if first == last else f"images {first} to {last}"

    def on_step(done: int, _: Any) -> None:
        report(f"{which} of {request.count}", min(1.0, done / settings.done_steps))

    return draw_pictures(pipe, settings, [request.picture(index) for index in indices], on_step, which, at_least)


def draw_pictures(
    pipe: Any,
    settings: Settings,
    pictures: Sequence[Picture],
    on_step: OnStep,
    which: str = "an image",
    at_least: int = 1,
) -> list[Image]:
    """Pictures drawn in one call, each by its own seed, prompts and images: either all have a negative prompt, or none.

    `at_least`: the smallest batch that the engines take; the last picture fills it up and is dropped again. `which`:
    what an EngineError calls them. What `on_step` raises ends the call.
    """
    import torch

    def after_step(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(step + 1, tensors["latents"])
        return tensors

    full = [*pictures, *[pictures[-1]] * (at_least - len(pictures))]
    guided = settings.guidance_scale > 1 and guidance_width(pipe.unet.config) is None
    size = {"height": settings.height, "width": settings.width} if settings.kind.sized else {}
    negatives = [one.negative_prompt for one in full if one.negative_prompt is not None]
    pipe.set_progress_bar_config(disable=True)
    seed_scheduler(pipe.scheduler, [one.seed for one in full])
    images: np.ndarray = pipe(
        **arguments(pipe, [one.prompt for one in full], negatives or None, settings.parts, guided),
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        generator=[torch.Generator().manual_seed(one.seed) for one in full],
        callback_on_step_end=after_step,
        output_type="np",
        **size,
        **settings.kind.arguments([one.images for one in full], settings.scales),
    ).images
    check_finite(images, which)
    return pipe.image_processor.numpy_to_pil(images[: len(pictures)])


def draw_all(
    pipe: Any,
    request: Request,
    files: Sequence[Path],
    settings: Sequence[dict[str, str]],
    batches: Sequence[Sequence[int]],
    report: Progress,
    *,
    at_least: int = 1,
) -> None:
    """Draw batches of a request and write every image with its settings as soon as its batch is done."""
    for number, indices in enumerate(batches):
        # The last step is not the end: images are decoded and written after it.
        part = within(report, 0.99 * number / len(batches), 0.99 * (number + 1) / len(batches))
        for index, image in zip(indices, draw(pipe, request, indices, part, at_least), strict=True):
            write_bytes(files[index], encode_png(image, settings[index]))


def metadata(request: Request, index: int, model: str, target: str, pipe: Any) -> dict[str, str]:
    """What a PNG says about itself, enough to make it again."""
    values = {
        "prompt": request.prompt(index),
        "negative_prompt": request.negative_prompt,
        "seed": request.seed + index,
        "steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "size": f"{request.height}x{request.width}",
        "scheduler": type(pipe.scheduler).__name__,
        "model": model,
        "target": target,
        "prompt_parts": request.parts if request.parts > 1 else None,
        "cache_interval": request.cache_interval if request.cache_interval > 1 else None,
        **request.inputs.settings(),
    }
    return {key: str(value) for key, value in values.items() if value is not None}


def encode_png(image: Image, text: dict[str, str]) -> bytes:
    """PNG bytes with text fields (UTF-8)."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=png_text(text))
    return buffer.getvalue()


def png_text(text: Mapping[str, str]) -> PngInfo:
    """Text fields of a PNG (UTF-8)."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    return info
