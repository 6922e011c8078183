"""The training loop: a student learns the task, its teacher's output and its teacher's features.

Only the student trains; the teacher runs frozen, in eval mode, on the same noisy latents, and is never saved.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdkd.console import Progress, quiet, within
from sdkd.distill.config import DistillConfig
from sdkd.distill.data import CaptionedImages
from sdkd.distill.features import FeatureUNet
from sdkd.distill.latents import LatentCache, TextEmbeddings, encode_images, training_size
from sdkd.distill.log import TrainingLog
from sdkd.distill.losses import distill_losses, prediction_type, task_target
from sdkd.distill.pairs import feature_pairs
from sdkd.errors import InputError, ModelError
from sdkd.students import full_config, student_config

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class DistillResult:
    """The trained student (eval mode, frozen, float32), what was logged, and how long it took."""

    student_unet: UNet2DConditionModel
    history: list[dict[str, float]]
    seconds: float
    steps: int


@dataclass(frozen=True)
class Batch:
    """What both UNets see: float32 latents and noise [b, c, h, w], timesteps [b] int64, text [b, s, d]."""

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    text: torch.Tensor


def distill(
    teacher_pipe: StableDiffusionPipeline,
    student_unet: UNet2DConditionModel,
    images: CaptionedImages | LatentCache,
    config: DistillConfig,
    progress: Progress = quiet,
    log_path: Path | None = None,
) -> DistillResult:
    """Train `student_unet` in place on captioned images and return it; the teacher's pipeline is left as it was.

    For several students of one teacher, `images` may be the latents that `encode_images` made of them.
    Raises ModelError when teacher, student and config do not belong together, InputError on unusable data or settings,
    TrainingError when a loss is not finite. The same seed gives the same weights on a CPU with the same thread count.
    """
    start = time.perf_counter()
    check_models(teacher_pipe, student_unet, config)
    device = pick_device(config)
    if isinstance(images, LatentCache):
        data, part = images, progress
    else:
        size, first = training_size(teacher_pipe, config.resolution), within(progress, 0.0, 0.1)
        data = encode_images(teacher_pipe, images, size=size, device=device, limit=config.max_images, progress=first)
        part = within(progress, 0.1, 1.0)
    text = TextEmbeddings(teacher_pipe, data.captions, device)
    trainer = Trainer(teacher_pipe, student_unet, data, text, config, device)
    try:
        history = _loop(trainer, config, part, log_path)
    finally:
        trainer.close()
    return DistillResult(student_unet, history, time.perf_counter() - start, config.steps)


def _loop(trainer: Trainer, config: DistillConfig, progress: Progress, log_path: Path | None) -> list[dict[str, float]]:
    log = TrainingLog(log_path)
    for step in range(1, config.steps + 1):
        lr = trainer.learning_rate
        log.add(trainer.step(), config.batch_size * config.accumulation)
        if step % config.log_every == 0 or step == config.steps:
            record = log.write(step, lr)
            progress(f"step {step} of {config.steps}, loss {record['loss/total']:.3f}", step / config.steps)
    trainer.finish()
    return log.history


class Trainer:
    """Teacher, student, data and optimizer of one run; `step` does one optimizer step."""

    def __init__(
        self,
        teacher_pipe: StableDiffusionPipeline,
        student_unet: UNet2DConditionModel,
        data: LatentCache,
        text: TextEmbeddings,
        config: DistillConfig,
        device: torch.device,
    ) -> None:
        from diffusers import DDPMScheduler

        self.config, self.device, self.data, self.text = config, device, data, text
        self.pairs = feature_pairs(config.spec, config.pair_preset)
        self.names = [name for _, name in self.pairs]
        self.dtype = _DTYPES[config.precision]
        self.scheduler = DDPMScheduler.from_config(teacher_pipe.scheduler.config)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.indices = shuffled(len(data), self.generator)
        self.teacher = FeatureUNet(_frozen(teacher_pipe.unet, device, self.dtype), [name for name, _ in self.pairs])
        _moved(student_unet, device, torch.float32).train().requires_grad_(True)
        self.student = FeatureUNet(student_unet, self.names)
        self.parameters = list(student_unet.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: lr_factor(step, config))
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.ema = _ema(student_unet, config.ema)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def draw(self) -> Batch:
        """The next batch; all randomness comes from one generator on the CPU."""
        count, generator = self.config.batch_size, self.generator
        indices = torch.tensor([next(self.indices) for _ in range(count)])
        latents = self.data.sample(indices, generator)
        noise = torch.randn(latents.shape, generator=generator)
        # Stratified: one timestep from each of `count` equal parts of the schedule, for less variance.
        position = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        timesteps = (position * self.scheduler.config.num_train_timesteps).long()
        empty = torch.rand(count, generator=generator) < self.config.caption_dropout
        latents, noise, timesteps = (tensor.to(self.device) for tensor in (latents, noise, timesteps))
        return Batch(latents, noise, timesteps, self.text(indices, empty))

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """All losses of a batch, float32 scalars."""
        noisy = self.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)  # [b, c, h, w]
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            with torch.no_grad():
                taught = self.teacher(noisy, batch.timesteps, batch.text)
            learnt = self.student(noisy, batch.timesteps, batch.text)
        target = task_target(self.scheduler, batch.latents, batch.noise, batch.timesteps)
        return distill_losses(learnt, taught, target, self.names, self.config.weights)

    def step(self) -> dict[str, torch.Tensor]:
        """One optimizer step over `accumulation` batches: the mean of each loss, and the gradient's norm unclipped."""
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, torch.Tensor] = {}
        for _ in range(self.config.accumulation):
            losses = self.losses(self.draw())
            self.scaler.scale(losses["loss/total"] / self.config.accumulation).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach() / self.config.accumulation
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        if self.ema is not None:
            self.ema.step(self.parameters)
        return sums | {"grad_norm": norm.detach()}

    def finish(self) -> None:
        """Put the averaged weights, if any, into the student."""
        if self.ema is not None:
            self.ema.copy_to(self.parameters)

    def close(self) -> None:
        """Take the hooks off both UNets and freeze the student."""
        self.teacher.close()
        self.student.close()
        self.student.unet.eval().requires_grad_(False)
        self.student.unet.zero_grad(set_to_none=True)


def _frozen(unet: UNet2DConditionModel, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """The teacher on the device, in the dtype of the forward passes; a copy unless it is there already."""
    if unet.device != device or unet.dtype != dtype:
        unet = _moved(copy.deepcopy(unet), device, dtype)
    return unet.eval().requires_grad_(False)


def _moved(unet: UNet2DConditionModel, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    torch.nn.Module.to(unet, device, dtype)  # torch's own: diffusers' warns about every change of dtype
    return unet


def _ema(unet: UNet2DConditionModel, decay: float) -> Any:
    from diffusers.training_utils import EMAModel

    return EMAModel(unet.parameters(), decay=decay, foreach=True) if decay else None


def lr_factor(step: int, config: DistillConfig) -> float:
    """Share of the learning rate after `step` optimizer steps: linear warm-up, then constant or half a cosine to 0."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def shuffled(count: int, generator: torch.Generator) -> Iterator[int]:
    """Indices below `count` without end: every pass over the data in a new order."""
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def pick_device(config: DistillConfig) -> torch.device:
    """The device to train on; InputError when it is not there or cannot do the precision."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name!r} is unknown: give auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r} is not on this machine: give --device cpu, or run where torch sees a GPU")
    if device.type == "cpu" and config.precision == "fp16":
        raise InputError("precision 'fp16' trains on CUDA devices only: give --precision bf16 or fp32")
    return device


def check_models(teacher_pipe: StableDiffusionPipeline, student: UNet2DConditionModel, config: DistillConfig) -> None:
    """ModelError unless the student is the config's student of this teacher, and the trainer knows such teachers."""
    expected = student_config(teacher_pipe.unet.config, config.student)
    found: Mapping[str, Any] = full_config(student.config)
    if wrong := [key for key, value in expected.items() if found[key] != value]:
        raise ModelError(
            f"the student's UNet is not the {config.spec.name} of this teacher ({wrong[0]}: expected "
            f"{expected[wrong[0]]}, found {found[wrong[0]]}): build it with build_student(teacher.unet, "
            f"{config.student!r})"
        )
    channels = int(teacher_pipe.vae.config.latent_channels)
    if expected["in_channels"] != channels:
        raise ModelError(
            f"the teacher's UNet takes {expected['in_channels']} channels, its VAE gives {channels}: inpainting and "
            "depth teachers cannot be distilled yet (their student can be built: sdkd student)"
        )
    if {id(p) for p in student.parameters()} & {id(p) for p in teacher_pipe.unet.parameters()}:
        raise ModelError("student and teacher share weights: build the student with build_student, which copies them")
    prediction_type(teacher_pipe.scheduler.config)
