"""A run from its first step to its last: log, validation images, checkpoints, and going on from one."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdkd.core.console import Progress, quiet, within
from sdkd.core.interrupts import between_steps
from sdkd.distill.data.encode import said_of_cut
from sdkd.distill.data.latents import Latents
from sdkd.distill.data.rows import CaptionedImages
from sdkd.distill.training.card import Origin
from sdkd.distill.training.checkpoint import kept_calibration, load_checkpoint, save_checkpoint, start_from, way_on
from sdkd.distill.training.config import TrainConfig
from sdkd.distill.training.finite import NotFiniteError
from sdkd.distill.training.log import LOG, Send, TrainingLog
from sdkd.distill.training.record import checkpoints
from sdkd.distill.training.rounding import Start
from sdkd.distill.training.samples import save_samples
from sdkd.distill.training.trainer import Trainer
from sdkd.errors import MissingExtraError, TrainingError

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    from sdkd.quantization.calibration import Calibration


@dataclass(frozen=True)
class TrainResult:
    """The trained UNet (eval mode, frozen, float32; a LoRA's with its adapter), what was logged, and how long it took.

    `images` is how many the data held, `unreadable` names those that could not be read, `notes` are what a user should
    know, `calibration` is what a run with rounding rounded by.
    """

    unet: UNet2DConditionModel
    history: list[dict[str, float]]
    seconds: float
    steps: int
    images: int
    unreadable: Mapping[int, str]
    main_process: bool = True
    notes: tuple[str, ...] = ()
    calibration: Calibration | None = None


def train(
    pipe: StableDiffusionPipeline,
    unet: UNet2DConditionModel,
    data: CaptionedImages | Latents,
    config: TrainConfig,
    *,
    progress: Progress = quiet,
    folder: Path | None = None,
    resume: Path | None = None,
    origin: Origin | None = None,
    adapter: Mapping[str, torch.Tensor] | None = None,
    teacher: UNet2DConditionModel | None = None,
) -> TrainResult:
    """Train `unet` in place on captioned images or on latents made before; `pipe` is left as it was.

    For distillation `pipe` is the teacher's and `unet` the student that build_student made; otherwise `pipe` holds the
    text encoder, VAE and scheduler that belong to `unet`. `teacher`: that of a LoRA for few steps where it is not
    `unet` itself, with the same latents, text embeddings and noise schedule. `folder` takes the log, checkpoints and
    validation images; `resume` is one of its checkpoints, `origin` what the models were loaded by, `adapter` the
    weights that a LoRA starts from. Raises ModelError when models and config do not belong together, InputError on
    unusable data or settings, TrainingError when a loss, gradient or weight is not finite, KeyboardInterrupt between
    two steps. On a CPU the same seed and threads give the same weights, resumed or not; torch's generator on the CPU is
    left as it was.
    """
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]), between_steps() as check:
        prepared = _checking(within(progress, 0.0, 0.1), check)
        start_of = Start(pipe, unet, data, config, origin or Origin(), folder, prepared)
        calibrate = partial(_calibration, start_of, resume) if config.quantize else None
        trainer = Trainer(pipe, unet, data, config, prepared, teacher, calibrate)
        trainer.origin = origin or Origin()
        try:
            if adapter:
                start_from(trainer, adapter)
            record = load_checkpoint(trainer, resume) if resume is not None else {}
            loop = _Run(trainer, folder, within(progress, 0.1, 1.0), check)
            if counted := record.get("log"):
                loop.log.restore(counted)
            notes = [*_notes(config, record), *_kept(trainer)]
            for note in notes:
                progress(note, None)
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
        notes=(*notes, *loop.notes, *_cut(trainer)),
        calibration=trainer.calibration,
    )


def _calibration(start: Start, resume: Path | None) -> Calibration:
    """What a run rounds by: recorded now, or by the run that it goes on with."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return start.calibration() if resume is None else kept_calibration(resume, start.config, processes)


def _cut(trainer: Trainer) -> list[str]:
    """What to tell of captions that were cut, now or when the cache was made."""
    text = trainer.batches.encode_text
    said = [said_of_cut(sorted(text.cut), text.limit)] if text.cut else []
    if of_cache := getattr(trainer.data, "cut", 0):
        said.append(
            f"{of_cache} captions of the cache have more than {text.limit} tokens, and were cut when it was made"
        )
    return said


def _notes(config: TrainConfig, record: Mapping[str, Any]) -> list[str]:
    """What a user should know about a run that goes on."""
    then = record["settings"]["steps"] if record else config.steps
    if then == config.steps or config.schedule == "constant":
        return []
    return [
        f"the {config.schedule} schedule was laid out for {then} steps up to step {record['step']}, and for "
        f"{config.steps} from there: a run of {config.steps} steps from its start would have had other learning rates "
        "(with --schedule constant it would have been the same)"
    ]


def _kept(trainer: Trainer) -> list[str]:
    """What to tell of a model for few steps that learns from noise as any other does."""
    config, made = trainer.config, trainer.origin.generation
    if made is None or not made.few_steps or not config.kind.keeps:
        return []
    whose = "teacher" if config.kind.teacher else "model"
    return [
        f"the result is to be run as its {whose} is ({made}); the task loss knows nothing of few steps, and a long run "
        "can lose them: look at its images (--prompts)"
    ]


def _checking(progress: Progress, check: Callable[[], None]) -> Progress:
    """A Progress that sees to signals, too."""

    def checked(message: str, fraction: float | None) -> None:
        check()
        progress(message, fraction)

    return checked


class _Run:
    """The loop, and what happens in it every so many steps; `check` sees to signals."""

    def __init__(self, trainer: Trainer, folder: Path | None, progress: Progress, check: Callable[[], None]) -> None:
        self.trainer, self.config, self.folder, self.progress = trainer, trainer.config, folder, progress
        self.check = check
        main = trainer.accelerator.is_main_process
        send = _trackers(trainer, folder) if main and trainer.config.trackers else None
        path = folder / LOG if folder is not None and main else None
        self.log = TrainingLog(path, step=trainer.done, send=send)
        self.waited = 0.0
        self.notes: list[str] = []

    def go(self) -> list[dict[str, float]]:
        """All remaining steps; TrainingError, which says how to go on, when something is not finite."""
        try:
            self._steps()
            self.trainer.finish()
        except NotFiniteError as error:
            raise TrainingError(f"{error}: training was stopped; {self._way_on()}") from error
        return self.log.history

    def _steps(self) -> None:
        trainer, config = self.trainer, self.config
        images = config.batch_size * config.accumulation * trainer.accelerator.num_processes
        while trainer.done < config.steps:
            self.check()
            lr = trainer.learning_rate
            self.log.add(trainer.step(), images)
            last = trainer.done == config.steps
            if trainer.done % config.log_every == 0 or last:
                self._record(lr)
            self._now_and_then(last)

    def _way_on(self) -> str:
        rate = f"--learning-rate {self.config.learning_rate / 10:g}"
        less = " or --precision bf16" if self.config.precision == "fp16" else ""
        kept = checkpoints(self.folder) if self.folder is not None else []
        if not kept:
            return f"start again with a lower rate, such as {rate}{less}"
        return f"{str(kept[-1])!r} is finite and kept: go on with {rate}{less} {way_on(kept[-1])}"

    def _now_and_then(self, last: bool) -> None:
        """Validation images and a checkpoint where one is due; the one at the end is there to go on from."""
        folder, done = self.folder, self.trainer.done
        if folder is None:
            return
        if self.config.prompts and (last or (self.config.sample_every and done % self.config.sample_every == 0)):
            self.progress(f"step {done}: validation images", done / self.config.steps)
            self._tell(done, save_samples(self.trainer, folder))
        if last or (self.config.save_every and done % self.config.save_every == 0):
            self.progress(f"step {done}: saving a checkpoint", done / self.config.steps)
            self._save(folder, last)

    def _tell(self, step: int, bad: list[int]) -> None:
        """Name validation images that were not finite. Training goes on: fp16 may overflow in the VAE alone."""
        if bad:
            named = ", ".join(repr(self.config.prompts[place]) for place in bad)
            note = (
                f"step {step}: the validation images of {named} are not finite (NaN or infinity), and a cross stands "
                "for them; try --precision bf16 or fp32, or a lower learning rate"
            )
            self.notes.append(note)
            self.progress(note, step / self.config.steps)

    def _save(self, folder: Path, last: bool) -> None:
        """A checkpoint; a disk too full for the last one must not cost the result."""
        try:
            save_checkpoint(self.trainer, folder, self.log.state())
        except OSError as error:
            if not last or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self.notes.append("the disk was too full for a last checkpoint: this run cannot be gone on with")
            self.trainer.accelerator.wait_for_everyone()

    def _record(self, lr: float) -> None:
        trainer, samples = self.trainer, self.trainer.batches.samples
        seconds = max(self.log.seconds, 1e-9)
        others = {
            "data_wait": min((samples.waited - self.waited) / seconds, 1.0),  # share of the time
            "memory_gb": peak_memory(trainer.device) / 1e9,
        }
        if samples.unreadable:
            others["unreadable"] = len(samples.unreadable)
        if cut := trainer.batches.encode_text.cut:
            others["cut_captions"] = len(cut)
        if trainer.rounded_layers:
            others["rounded_layers"] = trainer.rounded_layers
        if trainer.skips.total:
            others["skipped"] = trainer.skips.total  # steps of fp16, since the start
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


def _trackers(trainer: Trainer, folder: Path | None) -> Send:
    """Accelerate's trackers, given the settings, as one function; MissingExtraError names what is not installed."""
    from accelerate.tracking import filter_trackers

    accelerator, config = trainer.accelerator, trainer.config
    check_trackers(config)
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

    for name in config.trackers:  # the name is that of its module and of the extra that installs it
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(name, name, f"tracker {name!r}")
