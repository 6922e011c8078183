"""Training with rounding: a student computes as its engine of eight bits will, by ranges recorded when the run starts.

The ranges stay what they are while weights are trained, so that an engine which is built with them rounds what it is
given as training did; scales of weights follow the weights.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdkd.core.console import Progress, quiet
from sdkd.distill.data.encode import TextParts, placed, weights_sha256
from sdkd.distill.data.latents import Latents, training_size
from sdkd.distill.data.rows import CaptionedImages, caption_at
from sdkd.distill.training.card import Origin
from sdkd.distill.training.config import TrainConfig
from sdkd.distill.training.drawing import drawing_pipeline, result_scheduler
from sdkd.errors import InputError
from sdkd.quantization import recording
from sdkd.quantization.calibration import BESIDE_UNET, Calibration
from sdkd.quantization.fake import fake_quantized, unet_scales
from sdkd.quantization.recording import Usual, record
from sdkd.quantization.scheme import Scheme

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import StableDiffusionPipeline

FILE = BESIDE_UNET  # of a result; in a checkpoint, too


@dataclass(frozen=True, eq=False)
class Start:
    """What a run's ranges are recorded of, before anything is moved or trained; `folder` takes what is half done."""

    pipe: StableDiffusionPipeline
    unet: Any
    data: CaptionedImages | Latents
    config: TrainConfig
    origin: Origin
    folder: Path | None = None
    progress: Progress = quiet

    def calibration(self) -> Calibration:
        """Draw with captions of the data, as the result is to be run, in enough steps to see the whole way of a few."""
        pipe, config = self.pipe, self.config
        made = config.generation(self.origin.generation)
        usual = Usual.of(pipe.unet.config, pipe.vae.config, made)
        side = int(getattr(self.data, "size", 0)) or training_size(pipe, config.resolution)
        images = config.calibrate_images or usual.images
        steps = min(recording.STEPS, config.solver_steps) if config.kind.consistency else usual.steps
        return _recorded(
            pipe, self.unet, config, self.origin, weights=weights_sha256(self.unet, torch.float32),
            folder=self.folder, progress=self.progress, prompts=_captions(self.data, images), images=images,
            steps=steps, guidance=usual.guidance, height=side, width=side,
        )  # fmt: skip


def _captions(data: CaptionedImages | Latents, count: int) -> list[str]:
    """Captions from all over the data, without those that cannot be read; InputError when none can."""
    found, wrong = [], None
    for place in range(min(count, len(data))):
        index = place * len(data) // min(count, len(data))
        try:
            found.append(data.captions[index] if isinstance(data, Latents) else caption_at(data, index))
        except InputError as error:
            wrong = error
    if not found and wrong:
        raise wrong
    return found


def _recorded(
    pipe: Any, unet: Any, config: TrainConfig, origin: Origin, *, folder: Path | None, progress: Progress, **asked: Any
) -> Calibration:
    """`record` of a run's UNet among its pipeline's other parts."""
    parts = {"unet": unet, "vae": pipe.vae, **TextParts.of(pipe).named}
    placed_parts = {name: placed(part, "cpu", torch.float32) for name, part in parts.items()}
    drawing = drawing_pipeline(pipe, placed_parts, result_scheduler(pipe.scheduler, config, origin.generation))
    with tempfile.TemporaryDirectory() as spare, torch.no_grad():
        return record(drawing, folder_for_partial=folder or Path(spare), progress=progress, **asked)


def final_calibration(
    start: Start, trained: Calibration, unet: Any, weights: str, folder: Path, progress: Progress = quiet
) -> Calibration:
    """The calibration of what a run has made: its calls and images, with the ranges that it was trained with.

    `weights`: digest of the UNet as it was saved. `trained`: what training rounded by.
    """
    about = trained.about
    asked = {name: about[name] for name in ("prompts", "steps", "height", "width")}
    found = _recorded(
        start.pipe, unet, start.config, start.origin, weights=weights, folder=folder, progress=progress,
        images=len(about["seeds"]), guidance=about["guidance_scale"], **asked,
    )  # fmt: skip
    scheme = start.config.scheme
    noted = {"weights": trained.weights, "scheme": scheme and scheme.to_json(), "steps": start.config.steps}
    return replace(found, layers=trained.layers, about={**found.about, "trained": noted})


def shared(accelerator: Accelerator, make: Callable[[], Calibration]) -> Calibration:
    """What the first of the processes makes, in all of them."""
    if accelerator.num_processes == 1:
        return make()
    from accelerate.utils import broadcast_object_list

    content = [make().content if accelerator.is_main_process else b""]
    broadcast_object_list(content)
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder) / FILE).write_bytes(content[0])
        return Calibration.load(file)


@contextlib.contextmanager
def rounded(unet: torch.nn.Module, calibration: Calibration, scheme: Scheme) -> Iterator[int]:
    """Inside, the UNet computes with rounding; how many layers do."""
    scales = unet_scales(unet, calibration, scheme)
    with fake_quantized(unet, scales, scheme):
        yield len(scales)
