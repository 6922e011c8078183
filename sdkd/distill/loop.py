"""A run from its first step to its last: log, validation images, checkpoints, and going on from one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdkd.console import Progress, quiet, within
from sdkd.distill.checkpoint import load_checkpoint, save_checkpoint
from sdkd.distill.config import TrainConfig
from sdkd.distill.data import CaptionedImages
from sdkd.distill.latents import Latents
from sdkd.distill.log import LOG, Send, TrainingLog
from sdkd.distill.samples import save_samples
from sdkd.distill.trainer import Trainer
from sdkd.errors import MissingExtraError

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel


@dataclass(frozen=True)
class TrainResult:
    """The trained UNet (eval mode, frozen, float32; a LoRA's with its adapter), what was logged, and how long it took.

    `images` is how many the data held, `unreadable` names those that could not be read.
    """

    unet: UNet2DConditionModel
    history: list[dict[str, float]]
    seconds: float
    steps: int
    images: int
    unreadable: Mapping[int, str]
    main_process: bool = True


def train(
    pipe: StableDiffusionPipeline,
    unet: UNet2DConditionModel,
    data: CaptionedImages | Latents,
    config: TrainConfig,
    *,
    progress: Progress = quiet,
    folder: Path | None = None,
    resume: Path | None = None,
) -> TrainResult:
    """Train `unet` in place on captioned images or on latents made before; `pipe` is left as it was.

    For distillation `pipe` is the teacher's and `unet` the student that build_student made; otherwise `pipe` holds the
    text encoder, VAE and scheduler that belong to `unet`. `folder` takes the log, checkpoints and validation images;
    `resume` is one of its checkpoints. Raises ModelError when models and config do not belong together, InputError on
    unusable data or settings, TrainingError when a loss is not finite. On a CPU the same seed and thread count give the
    same weights, resumed or not.
    """
    start = time.perf_counter()
    trainer = Trainer(pipe, unet, data, config, within(progress, 0.0, 0.1))
    try:
        record = load_checkpoint(trainer, resume) if resume is not None else {}
        loop = _Run(trainer, folder, within(progress, 0.1, 1.0))
        if counted := record.get("log"):
            loop.log.restore(counted)
        history = loop.go()
    finally:
        trainer.close()
    samples = trainer.batches.samples
    return TrainResult(
        unet=unet,
        history=history,
        seconds=time.perf_counter() - start,
        steps=config.steps,
        images=len(samples),
        unreadable=dict(samples.unreadable),
        main_process=trainer.accelerator.is_main_process,
    )


class _Run:
    """The loop, and what happens in it every so many steps."""

    def __init__(self, trainer: Trainer, folder: Path | None, progress: Progress) -> None:
        self.trainer, self.config, self.folder, self.progress = trainer, trainer.config, folder, progress
        main = trainer.accelerator.is_main_process
        send = _trackers(trainer, folder) if main and trainer.config.trackers else None
        path = folder / LOG if folder is not None and main else None
        self.log = TrainingLog(path, step=trainer.done, send=send)
        self.waited = 0.0

    def go(self) -> list[dict[str, float]]:
        """All remaining steps."""
        trainer, config = self.trainer, self.config
        images = config.batch_size * config.accumulation * trainer.accelerator.num_processes
        while trainer.done < config.steps:
            lr = trainer.learning_rate
            self.log.add(trainer.step(), images)
            last = trainer.done == config.steps
            if trainer.done % config.log_every == 0 or last:
                self._record(lr)
            self._now_and_then(last)
        trainer.finish()
        return self.log.history

    def _now_and_then(self, last: bool) -> None:
        """Validation images and a checkpoint where one is due; at the end the result itself is saved instead."""
        folder, done = self.folder, self.trainer.done
        if folder is None:
            return
        if self.config.prompts and (last or (self.config.sample_every and done % self.config.sample_every == 0)):
            self.progress(f"step {done}: validation images", done / self.config.steps)
            save_samples(self.trainer, folder)
        if self.config.save_every and done % self.config.save_every == 0 and not last:
            self.progress(f"step {done}: saving a checkpoint", done / self.config.steps)
            save_checkpoint(self.trainer, folder, self.log.state())

    def _record(self, lr: float) -> None:
        trainer, samples = self.trainer, self.trainer.batches.samples
        seconds = max(self.log.seconds, 1e-9)
        others = {
            "data_wait": min((samples.waited - self.waited) / seconds, 1.0),  # share of the time
            "memory_gb": peak_memory(trainer.device) / 1e9,
        }
        if samples.unreadable:
            others["unreadable"] = len(samples.unreadable)
        self.waited = samples.waited
        record = self.log.write(trainer.done, lr, means=trainer.mean_over_processes(self.log.means()), others=others)
        shown = f"step {trainer.done} of {self.config.steps}, loss {record['loss/total']:.3f}"
        self.progress(shown, trainer.done / self.config.steps)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch had allocated on a GPU, or that this process had resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource
    import sys

    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024  # Linux counts in KiB


# Tracker -> (module that it needs, extra that installs it).
_TRACKERS = {"tensorboard": ("tensorboard", "tensorboard"), "wandb": ("wandb", "wandb")}


def _trackers(trainer: Trainer, folder: Path | None) -> Send:
    """Accelerate's trackers, told the settings, as one function; MissingExtraError names what is not installed."""
    accelerator, config = trainer.accelerator, trainer.config
    check_trackers(config)
    from accelerate.tracking import filter_trackers

    kinds = filter_trackers(list(config.trackers), str(folder or "."))
    flat = {
        key: value if isinstance(value, int | float | str) else str(value) for key, value in config.to_json().items()
    }
    accelerator.log_with = kinds
    accelerator.project_configuration.set_directories(str(folder or "."))
    accelerator.init_trackers("sdkd", config=flat)

    def send(record: Mapping[str, float], step: int) -> None:
        values: dict[str, Any] = {name: value for name, value in record.items() if name != "step"}
        accelerator.log(values, step=step)

    return send


def check_trackers(config: TrainConfig) -> None:
    """MissingExtraError unless every tracker that was asked for can be imported."""
    import importlib.util

    for name in config.trackers:
        module, extra = _TRACKERS[name]
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(module, extra, f"tracker {name!r}")
