"""The steps of a run that trains a small VAE: log, checkpoints, and at the end how near its images are."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdkd.core.console import Progress, quiet, within
from sdkd.core.files import write_bytes
from sdkd.core.interrupts import between_steps
from sdkd.distill.data.digests import data_digest
from sdkd.distill.data.encode import weights_sha256
from sdkd.distill.training.finite import NotFiniteError
from sdkd.distill.training.log import LOG, TrainingLog
from sdkd.distill.training.samples import FOLDER, joined
from sdkd.distill.vae.checkpoint import load_checkpoint, save_checkpoint
from sdkd.distill.vae.config import VaeConfig
from sdkd.distill.vae.trainer import VaeTrainer, decode, new_vae
from sdkd.errors import TrainingError

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

    from sdkd.distill.data.latents import Latents
    from sdkd.distill.data.rows import CaptionedImages

SHOWN = 8  # images that the two decoders are compared on at the end


@dataclass(frozen=True)
class VaeResult:
    """The trained VAE (eval mode, frozen, float32), what was logged, and the PSNR of SHOWN training images in dB."""

    vae: AutoencoderTiny
    history: list[dict[str, float]]
    seconds: float
    images: int
    unreadable: Mapping[int, str]
    psnr_db: float


def train_vae(
    teacher: Any,
    data: CaptionedImages | Latents,
    config: VaeConfig,
    unet_config: Mapping[str, Any],
    *,
    progress: Progress = quiet,
    folder: Path | None = None,
    resume: Path | None = None,
) -> VaeResult:
    """Train a small VAE from `teacher`, which stays as it is, on images or on latents made before.

    `folder` takes log, checkpoints and a picture of both decoders' images; `resume` is one of its checkpoints.
    `unet_config` tells the model's own size. Raises InputError on unusable data or settings, TrainingError when a loss,
    gradient or weight is not finite, KeyboardInterrupt between two steps. On a CPU the same seed and number of threads
    give the same weights, resumed or not.
    """
    start = time.perf_counter()
    with between_steps() as check:

        def checked(message: str, fraction: float | None) -> None:
            check()
            progress(message, fraction)

        trainer = VaeTrainer(teacher, new_vae(teacher, config), data, config, unet_config, within(checked, 0, 0.1))
        digests = {"data": data_digest(data), "teacher": weights_sha256(teacher, torch.float32)} if folder else {}
        try:
            counted = None if resume is None else load_checkpoint(trainer, resume, digests)
            log = TrainingLog(None if folder is None else folder / LOG, step=trainer.done)
            if counted is not None:
                log.restore(counted)
            _steps(trainer, log, folder, digests, within(progress, 0.1, 1), check)
            trainer.finish()
        except NotFiniteError as error:
            lower = f"start again with --learning-rate {config.run.learning_rate / 10:g}"
            raise TrainingError(f"{error}: training was stopped; {lower}") from error
        finally:
            trainer.close()
        psnr = _compare(trainer, folder)
    samples = trainer.samples
    return VaeResult(
        trainer.vae, log.history, time.perf_counter() - start, len(samples), dict(samples.unreadable), psnr
    )


def _steps(
    trainer: VaeTrainer,
    log: TrainingLog,
    folder: Path | None,
    digests: Mapping[str, str],
    progress: Progress,
    check: Callable[[], None],
) -> None:
    run = trainer.config.run
    while trainer.done < run.steps:
        check()
        lr = trainer.learning_rate
        log.add(trainer.step(), run.batch_size)
        last = trainer.done == run.steps
        if trainer.done % run.log_every == 0 or last:
            record = log.write(trainer.done, lr)
            progress(f"step {trainer.done} of {run.steps}, loss {record['loss/total']:.3f}", trainer.done / run.steps)
        if folder is not None and (last or (run.save_every and trainer.done % run.save_every == 0)):
            save_checkpoint(trainer, folder, log.state(), digests)


def _compare(trainer: VaeTrainer, folder: Path | None) -> float:
    """Mean PSNR in dB of the small VAE's images to its teacher's, of the first images of the data, which are drawn in
    pairs to a picture in the folder.
    """
    from diffusers.image_processor import VaeImageProcessor

    rows = [trainer.samples.stream([(index, index)]) for index in range(min(SHOWN, len(trainer.samples)))]
    latents = [next(iter(row)).mean.float()[None].to(trainer.device) for row in rows]
    pairs = [(decode(trainer.teacher, one), decode(trainer.vae, one)) for one in latents]
    if folder is not None:
        show = VaeImageProcessor().postprocess
        pictures = [image for pair in pairs for one in pair for image in show(one.cpu(), output_type="pil")]
        stream = io.BytesIO()
        joined(pictures).save(stream, "PNG")
        write_bytes(folder / FOLDER / f"step-{trainer.done:06d}.png", stream.getvalue())
    errors = [float((own.clamp(-1, 1) - other.clamp(-1, 1)).square().mean()) for own, other in pairs]
    return sum(10 * math.log10(4 / max(error, 1e-10)) for error in errors) / len(errors)
