"""Validation images: the same prompts with the same seeds every few steps, as one picture each time."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdkd.core.files import write_bytes, write_json
from sdkd.core.images import is_finite
from sdkd.distill.training.drawing import drawing_pipeline, result_scheduler
from sdkd.models.generation import USUAL
from sdkd.models.schedulers import seed_scheduler

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    from sdkd.distill.training.trainer import Trainer

FOLDER = "samples"


def save_samples(trainer: Trainer, folder: Path) -> list[int]:
    """Draw the validation prompts with the averaged weights and save them; the first process draws, the others wait.

    Returns the places of the prompts whose pixels were not finite: a cross stands for their images.
    """
    bad: list[int] = []
    if trainer.accelerator.is_main_process:
        path = folder / FOLDER / f"step-{trainer.done:06d}.png"
        stream, images = io.BytesIO(), draw(trainer)
        bad = [place for place, image in enumerate(images) if not is_finite(image)]
        to_pil = trainer.pipe.image_processor.numpy_to_pil
        pictures = [crossed(image) if place in bad else to_pil(image)[0] for place, image in enumerate(images)]
        joined(pictures).save(stream, "PNG")
        write_bytes(path, stream.getvalue())
        write_json(path.parent / "prompts.json", {"prompts": list(trainer.config.prompts), "seed": trainer.config.seed})
    trainer.accelerator.wait_for_everyone()
    return bad


def draw(trainer: Trainer) -> list[NDArray[Any]]:
    """Pixels [h, w, 3], 0 to 1, for every validation prompt; prompt i always starts from the noise of seed + i."""
    pipe, config, images = _pipeline(trainer), trainer.config, []
    made = trainer.origin.generation
    run = config.generation(made) or made or USUAL  # a LoRA is drawn as its model is
    with trainer.averaged(), torch.autocast(trainer.device.type, trainer.dtype, enabled=trainer.dtype != torch.float32):
        for index, prompt in enumerate(config.prompts):
            generator = torch.Generator().manual_seed(config.seed + index)
            seed_scheduler(pipe.scheduler, [config.seed + index])
            made = pipe(
                prompt,
                num_inference_steps=config.sample_steps or run.steps,
                guidance_scale=run.guidance_scale,
                generator=generator,
                output_type="np",
            )
            images += list(made.images)
    return images


def _pipeline(trainer: Trainer) -> Any:
    """The trained UNet among the frozen parts of its run."""
    scheduler = result_scheduler(trainer.pipe.scheduler, trainer.config, trainer.origin.generation)
    return drawing_pipeline(trainer.pipe, {"unet": trainer.unet, "vae": trainer.vae, **trainer.text.named}, scheduler)


def crossed(pixels: NDArray[Any]) -> Image:
    """A cross in the size of an image that could not be drawn."""
    from PIL import Image as Pillow
    from PIL import ImageDraw

    height, width = pixels.shape[:2]
    image = Pillow.new("RGB", (width, height), "white")
    for line in ((0, 0, width, height), (0, height, width, 0)):
        ImageDraw.Draw(image).line(line, fill="red", width=2)
    return image


def joined(images: Sequence[Image]) -> Image:
    """Images of one size side by side, four in a row."""
    from PIL import Image as Pillow

    width, height = images[0].size
    across = min(4, len(images))
    sheet = Pillow.new("RGB", (width * across, height * -(-len(images) // across)), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (width * (index % across), height * (index // across)))
    return sheet
