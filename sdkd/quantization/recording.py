"""Calibration: a pipeline draws images on the CPU while what its UNet's layers are given is noted; goes on if ended."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sdkd.core.conditions import guidance_width
from sdkd.core.console import Progress, quiet
from sdkd.core.contract import check_size, native_size, size_multiple
from sdkd.core.numbers import DRAWING, check_numbers
from sdkd.errors import InputError, ModelError
from sdkd.models.generation import USUAL, Generation, implied
from sdkd.models.schedulers import check_steps, seed_scheduler
from sdkd.quantization.calibration import Calibration, LayerStatistics

if TYPE_CHECKING:
    from PIL.Image import Image

    from sdkd.quantization.watching import Watch

IMAGES, STEPS = 4, 10  # by default; a model of fewer steps takes its own
SMALL_PX, SMALL_IMAGES, SMALL_GUIDANCE = 64, 8, 4.0  # models of drawn shapes, like the demo's
_UNGUIDED = 4  # one image in so many is drawn without guidance: engines are asked for such ones, too
_CALLS = (0.0, 0.25, 0.5, 0.75, 1.0)  # places among an image's UNet calls; each is kept of another image
_KEPT = 4  # images whose final latents are kept


class Usual(NamedTuple):
    """What a calibration takes where nothing is asked for."""

    small: bool  # whether the model draws shapes, like the demo's
    images: int
    steps: int
    guidance: float

    @staticmethod
    def of(unet_config: Mapping[str, Any], vae_config: Mapping[str, Any], made: Generation | None) -> Usual:
        """By a model's configs, and how it was made to be run."""
        size = native_size(unet_config, vae_config)
        small = size is not None and max(size) <= SMALL_PX
        guidance = made.guidance_scale if made else SMALL_GUIDANCE if small else USUAL.guidance_scale
        return Usual(small, SMALL_IMAGES if small else IMAGES, min(made.steps, STEPS) if made else STEPS, guidance)


def record(
    pipe: Any,
    prompts: Sequence[str],
    *,
    weights: str,
    images: int = IMAGES,
    steps: int | None = None,
    guidance: float | None = None,
    height: int | None = None,
    width: int | None = None,
    folder_for_partial: Path,
    progress: Progress = quiet,
) -> Calibration:
    """Draw `images` images (seeds from 0, the prompts in turn) and note what the UNet's layers are given.

    `pipe`: an eager pipeline of sdkd.models in float32 on the CPU; `weights`: digest of its UNet. Steps and guidance
    scale default to what its configs tell that it was made for, the size (pixels) to its own. After every image a file
    in `folder_for_partial` says how far it is; a call with the same settings goes on from there and gives the same
    bits. InputError for no prompts, a number or size that makes no sense; ValuesError for NaN and infinity.
    """
    if not prompts:
        raise InputError("there are no prompts to calibrate with: give at least one")
    about = _about(pipe, prompts, images, steps, guidance, (height, width))
    partial = folder_for_partial / f"calibration-{_key(pipe, weights, about)}.partial.safetensors"
    found = _resumed(partial, weights, about, progress)
    for number in range(_done(found), images):
        found = _with_image(pipe, found, number, progress)
        if number + 1 < images:
            found.save(partial)
    partial.unlink(missing_ok=True)
    return found


def _about(
    pipe: Any,
    prompts: Sequence[str],
    images: int,
    steps: int | None,
    guidance: float | None,
    size: tuple[int | None, int | None],
) -> dict[str, Any]:
    scheduler = type(pipe.scheduler).__name__
    made = implied(pipe.unet.config, scheduler, type(pipe).__name__) or USUAL
    run: Generation = made.with_asked(steps, guidance, None)
    own = native_size(pipe.unet.config, pipe.vae.config) or (None, None)
    height, width = size[0] or own[0], size[1] or own[1]
    if height is None or width is None:
        raise InputError("the UNet's sample_size says no size: give height and width to calibrate at")
    check_numbers({"count": images, "height": height, "width": width}, DRAWING)
    check_size(height, width, size_multiple(pipe.unet.config, pipe.vae.config))
    check_steps(pipe.scheduler, run.steps)
    halves = run.guidance_scale > 1 and guidance_width(pipe.unet.config) is None
    return {
        "prompts": [prompts[number % len(prompts)] for number in range(images)],
        "seeds": list(range(images)),
        "guided": [halves and number % _UNGUIDED != _UNGUIDED - 1 for number in range(images)],
        "steps": run.steps,
        "guidance_scale": run.guidance_scale,
        "scheduler": scheduler,
        "height": height,
        "width": width,
    }


def _key(pipe: Any, weights: str, about: Mapping[str, Any]) -> str:
    settings = {"weights": weights, "scheduler": dict(pipe.scheduler.config), "pipeline": type(pipe).__name__}
    return hashlib.sha256(json.dumps([settings, about], sort_keys=True, default=str).encode()).hexdigest()[:16]


def _done(found: Calibration) -> int:
    """How many images are in it."""
    return int(found.about.get("done", len(found.about["seeds"])))


def _resumed(partial: Path, weights: str, about: dict[str, Any], progress: Progress) -> Calibration:
    if partial.exists():
        with contextlib.suppress(ModelError):
            found = Calibration.load(partial)
            progress(f"going on after {_done(found)} images", _done(found) / len(about["seeds"]))
            return found
        progress(f"{partial} is damaged: starting again", 0.0)
    return Calibration(weights, about | {"done": 0}, {}, (), np.zeros((0, 4, 1, 1), np.float32))


def _with_image(pipe: Any, found: Calibration, number: int, progress: Progress) -> Calibration:
    """The calibration and one image more."""
    from sdkd.quantization.watching import Watch

    about, total = found.about, len(found.about["seeds"])
    expected = len(about.get("timesteps", ())) or about["steps"]

    def on_call(call: int) -> None:
        share = min((call - 1) / expected, 1.0)
        progress(f"calibration: image {number + 1} of {total}, step {call}", (number + share) / total)

    with Watch(pipe.unet, on_call) as watch:
        latents = draw(pipe, about, number)
    done = {} if number + 1 == total else {"done": number + 1}
    kept = {key: value for key, value in about.items() if key != "done"}
    images = latents if number == 0 else np.concatenate([found.images, latents]) if number < _KEPT else found.images
    return Calibration(
        found.weights,
        kept | done | {"timesteps": watch.timesteps},
        _merged(found.layers, watch.statistics(), number),
        (*found.calls, *(watch.call(place) for place in _places(number, total, watch))),
        images,
    )


def _places(number: int, total: int, watch: Watch) -> list[int]:
    """Which calls of an image are kept."""
    last = len(watch.timesteps) - 1
    own = [share for place, share in enumerate(_CALLS) if place % total == number]
    return sorted({round(share * last) for share in own})


def _merged(
    before: Mapping[str, LayerStatistics], new: Mapping[str, LayerStatistics], count: int
) -> dict[str, LayerStatistics]:
    """Statistics of `count` images and one more. Means are kept, not sums, so that a partial file is a whole one."""
    if not count:
        return dict(new)
    found = {}
    for name, one in new.items():
        was = before[name]
        lows = {kind: np.minimum(getattr(was, kind), getattr(one, kind)) for kind in ("low", "out_low")}
        highs = {kind: np.maximum(getattr(was, kind), getattr(one, kind)) for kind in ("high", "out_high", "channels")}
        means = {
            kind: getattr(was, kind) + (getattr(one, kind) - getattr(was, kind)) / np.float32(count + 1)
            for kind in ("low_percentile", "high_percentile")
        }
        found[name] = replace(was, **lows, **highs, **means)
    return found


def draw(pipe: Any, about: Mapping[str, Any], number: int) -> np.ndarray:
    """The final latents of an image, float32 `[1, channels, h, w]`."""
    import torch

    seed, scale = about["seeds"][number], about["guidance_scale"]
    embedded = guidance_width(pipe.unet.config) is not None
    seed_scheduler(pipe.scheduler, [seed])
    given = {
        "num_inference_steps": about["steps"],
        "guidance_scale": scale if about["guided"][number] or embedded else 1.0,
        "generator": torch.Generator("cpu").manual_seed(seed),
        "output_type": "latent",
        **_images(pipe, about, number),
    }
    made: torch.Tensor = pipe(about["prompts"][number], **given).images
    return made.detach().float().cpu().numpy()


def _images(pipe: Any, about: Mapping[str, Any], number: int) -> dict[str, Any]:
    """What a pipeline that looks at images gets beside its prompt, and the size where it takes one."""
    taken = inspect.signature(type(pipe).__call__).parameters
    size = {name: about[name] for name in ("height", "width")}
    found: dict[str, Any] = {name: side for name, side in size.items() if name in taken}
    if "image" in taken:
        found["image"] = _picture(number, **size)
    if "mask_image" in taken:
        found["mask_image"] = _mask(**size)
    return found


def _picture(number: int, height: int, width: int) -> Image:
    from sdkd.toyworld.scenes import all_scenes, render, sample_scenes

    (*_, scene) = sample_scenes(all_scenes(), number % len(all_scenes()) + 1, 0)
    return render(scene, number, max(height, width)).resize((width, height))


def _mask(height: int, width: int) -> Image:
    """White, which is drawn again, in the middle."""
    from PIL import Image, ImageDraw

    found = Image.new("L", (width, height), 0)
    ImageDraw.Draw(found).rectangle((width // 4, height // 4, width - width // 4 - 1, height - height // 4 - 1), 255)
    return found
