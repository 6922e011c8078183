"""Drawing a request in batches: each image with a generator of its own, written as soon as its batch is done."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.generate.image_inputs import TEXT, Inputs, PipelineKind, done_steps
from engines.generate.long_prompts import arguments, limit_of
from sdkd.core.components import guidance_copies
from sdkd.core.conditions import guidance_width
from sdkd.core.console import Progress, within
from sdkd.core.files import write_bytes
from sdkd.core.images import check_finite
from sdkd.core.numbers import DRAWING, SEED, check_number, check_numbers
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.models.schedulers import seed_scheduler

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


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
    parts: int = 1  # in which prompts are read: see engines.generate.long_prompts
    cache_interval: int = 1  # of the UNet: see sdkd.models.step_caching

    def __post_init__(self) -> None:
        check_numbers({**self.inputs.scales, **vars(self)}, DRAWING)
        check_number("seed of the last image", self.seed + self.count - 1, SEED.low, SEED.high, whole=True)

    def prompt(self, index: int) -> str:
        """The prompt of an image."""
        return self.prompts[index % len(self.prompts)]

    @property
    def guided(self) -> bool:
        """Whether the UNet sees every image more than once a step."""
        return self.guidance_scale > 1 and self.inputs.scales.get("image_guidance_scale", 1.0) >= 1


def engine_batch(pipe: Any, request: Request) -> Range:
    """Images per call that the UNet's engine was built for, at the size of the request; 1 without engine or profile.

    An engine's batch holds all copies that guidance stacks; without guidance they are room for more images.
    """
    session = getattr(pipe.unet, "session", None)
    if session is None:
        return Range.fixed(1)
    copies = guidance_copies(session.contract)
    used = copies if request.guided else 1
    fixed = session.contract.inputs[0].axes[0]
    if isinstance(fixed, int):
        return Range.fixed(max(1, fixed // used))
    profiles: Sequence[ShapeRanges] = session.checked.record.profiles
    tokens = request.parts * limit_of(pipe)
    fitting = [
        profile.batch
        for profile in profiles
        if request.height in profile.height and request.width in profile.width and tokens in profile.sequence
    ]
    if not fitting:
        return Range.fixed(1)
    low, high = min(r.min for r in fitting), max(r.max for r in fitting) * copies // used
    return Range(low, low, high)


def in_batches(indices: Sequence[int], size: int) -> list[list[int]]:
    """The images in groups of `size`, the last one smaller where they do not come out even."""
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]


def draw(pipe: Any, request: Request, indices: Sequence[int], report: Progress, at_least: int = 1) -> list[Image]:
    """Some images of a request in one call, each of its own seed.

    `at_least`: the smallest batch that the engines take; the last image fills it up and is dropped again.
    """
    import torch

    steps = done_steps(request.inputs.scales, request.steps)
    first, last = indices[0] + 1, indices[-1] + 1
    which = f"image {first}" if first == last else f"images {first} to {last}"

    def on_step(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        report(f"{which} of {request.count}", min(1.0, (step + 1) / steps))
        return tensors

    guided = request.guidance_scale > 1 and guidance_width(pipe.unet.config) is None
    full = [*indices, *[indices[-1]] * (at_least - len(indices))]
    size = {"height": request.height, "width": request.width} if request.kind.sized else {}
    pipe.set_progress_bar_config(disable=True)
    seed_scheduler(pipe.scheduler, [request.seed + index for index in full])
    images: np.ndarray = pipe(
        **arguments(pipe, [request.prompt(index) for index in full], request.negative_prompt, request.parts, guided),
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=[torch.Generator().manual_seed(request.seed + index) for index in full],
        callback_on_step_end=on_step,
        output_type="np",
        **size,
        **request.inputs.arguments(request.kind, len(full)),
    ).images
    check_finite(images, which)
    return pipe.image_processor.numpy_to_pil(images[: len(indices)])


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
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()
