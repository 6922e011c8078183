"""The trainer: a student learns the task, its teacher's output and its teacher's features, or to take few steps; or a
UNet learns alone.

Only the trained UNet (or its LoRA) is prepared by Accelerate and saved; the teacher, VAE and text encoder are frozen,
in the precision of the forward passes, and never leave their process.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from sdkd.core.conditions import GUIDANCE, nested, takes_sizes
from sdkd.core.console import Progress, quiet
from sdkd.core.contract import torch_dtype
from sdkd.distill.data.digests import data_digest, model_digest
from sdkd.distill.data.encode import TextParts, placed, together
from sdkd.distill.data.latents import Latents, TextEmbeddings
from sdkd.distill.data.order import DROPOUT, generator_at
from sdkd.distill.data.rows import CaptionedImages
from sdkd.distill.training.batches import Batch, Batches, Place
from sdkd.distill.training.card import Origin
from sdkd.distill.training.config import TrainConfig
from sdkd.distill.training.consistency import Solver, guidance_embedding, guided, pseudo_huber
from sdkd.distill.training.finite import SkippedSteps, check_weights, not_finite
from sdkd.distill.training.losses import (
    FeatureUNet,
    Learnt,
    SampleWeights,
    distill_losses,
    feature_losses,
    min_snr_weights,
    task_target,
)
from sdkd.distill.training.rounding import rounded, shared
from sdkd.distill.training.setup import (
    check_models,
    make_accelerator,
    make_optimizer,
    make_samples,
    pick_device,
    training_pairs,
)
from sdkd.models.schedulers import scheduler_like

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    from sdkd.quantization.calibration import Calibration


class Trainer:
    """Models, data and optimizer of one run; `step` does one optimizer step."""

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        unet: UNet2DConditionModel,
        data: CaptionedImages | Latents,
        config: TrainConfig,
        progress: Progress = quiet,
        teacher: UNet2DConditionModel | None = None,
        calibrate: Callable[[], Calibration] | None = None,
    ) -> None:
        """`calibrate`: gives what a run rounds by, while models are where the caller has them; asked in one process."""
        from diffusers import DDPMScheduler
        from diffusers.training_utils import EMAModel

        check_models(pipe, unet, config, teacher)
        device = pick_device(config.device, config.precision)
        self.config, self.pipe, self.unet = config, pipe, unet
        self.dtype = torch_dtype(config.precision)
        self.accelerator = make_accelerator(config, device)
        self.device: torch.device = self.accelerator.device
        self.calibration = shared(self.accelerator, calibrate) if calibrate else None
        self.scheduler = scheduler_like(pipe.scheduler, DDPMScheduler)
        self.vae = placed(pipe.vae, self.device, self.dtype)
        parts = TextParts.of(pipe)
        self.text = parts.placed(self.device, self.dtype)
        self.data, self.origin = data, Origin()
        self._model = model_digest((pipe.unet, pipe.vae, *parts.encoders), self.scheduler, self.dtype)
        self._other = model_digest((teacher,), self.scheduler, self.dtype) if teacher is not None else None
        self.solver = Solver(self.scheduler, config.solver_steps, self.device) if config.kind.consistency else None
        self.batches = self._batches(data, progress)
        pairs = training_pairs(config, pipe.unet.config)
        self.names = [own for _, own in pairs]
        self.teacher = self._teacher(teacher, [name for name, _ in pairs])
        self.parameters = self._trainable()
        self.target = FeatureUNet(copy.deepcopy(unet).requires_grad_(False).eval(), ()) if config.target_ema else None
        self.rounded_layers, self._rounding = 0, contextlib.ExitStack()
        self._round()
        self.student = FeatureUNet(unet, self.names)  # hooks before any compilation
        self.optimizer, self.schedule, self.model = self._prepared()
        self.ema: Any = EMAModel(self.parameters, decay=config.ema, foreach=True) if config.ema else None
        self.done = 0  # optimizer steps, those that fp16 skipped included
        self.skips = SkippedSteps()
        # Dropout draws from torch's global generators: each process has its own.
        torch.manual_seed(generator_at(config.seed, self.accelerator.process_index, DROPOUT).initial_seed())

    def _batches(self, data: CaptionedImages | Latents, progress: Progress) -> Batches:
        place = Place(self.accelerator.process_index, self.accelerator.num_processes, self.device)
        samples, order = make_samples(self.pipe, self.vae, data, self.config, place, progress)
        text, every = TextEmbeddings(self.text), range(int(self.scheduler.config.num_train_timesteps))
        points, sized = self.solver.points if self.solver else every, takes_sizes(self.pipe.unet.config)
        return Batches(samples, order, text, self.config, place, points, sized)

    def _teacher(self, other: UNet2DConditionModel | None, names: list[str]) -> FeatureUNet | None:
        """The frozen teacher: `other`, else the pipeline's UNet; of a LoRA's own, a twin that shares its weights."""
        if not self.config.kind.teacher:
            return None
        if other is None and self.config.kind.lora:
            torch.nn.Module.to(self.unet, self.device, self.dtype)
            shared = {id(tensor): tensor for tensor in (*self.unet.parameters(), *self.unet.buffers())}
            other = copy.deepcopy(self.unet, shared)
        unet = placed(self.pipe.unet if other is None else other, self.device, self.dtype)
        if self.config.channels_last:
            unet.to(memory_format=torch.channels_last)
        return FeatureUNet(unet, names)

    def _trainable(self) -> list[torch.nn.Parameter]:
        """The parameters to train, float32 on the device; for a LoRA the update matrices alone."""
        config = self.config
        if config.kind.lora:
            from sdkd.distill.training.lora import add_lora

            torch.nn.Module.to(self.unet, self.device, self.dtype)
            parameters = add_lora(
                self.unet,
                rank=config.lora_rank,
                alpha=config.lora_alpha or config.lora_rank,
                targets=config.lora_targets,
                dropout=config.lora_dropout,
                seed=config.seed,
            )
        else:  # torch's own `to`: diffusers' warns about every change of dtype
            torch.nn.Module.to(self.unet, self.device, torch.float32)
            self.unet.requires_grad_(True)
            parameters = list(self.unet.parameters())
        if config.channels_last:
            self.unet.to(memory_format=torch.channels_last)
        if config.checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.unet.train()
        return parameters

    def _round(self) -> None:
        """Let what is trained, and what is an average of it, compute with rounding until `close`."""
        if self.calibration is None or self.config.scheme is None:
            return
        for unet in (self.unet, *([self.target.unet] if self.target else [])):
            inside = rounded(unet, self.calibration, self.config.scheme)
            self.rounded_layers = self._rounding.enter_context(inside)

    def _prepared(self) -> tuple[Any, torch.optim.lr_scheduler.LambdaLR, Any]:
        """Optimizer, schedule and model as Accelerate wraps them (data-parallel, autocast to the precision)."""
        plain = make_optimizer(self.parameters, self.config)
        # Not prepared: Accelerate would step it once per process.
        schedule = torch.optim.lr_scheduler.LambdaLR(plain, lambda step: lr_factor(step, self.config))
        model: Any = self.student
        if self.config.compile:
            model = torch.compile(model)
            self.teacher_call = torch.compile(self.teacher) if self.teacher else None
        else:
            self.teacher_call = self.teacher
        model, optimizer = self.accelerator.prepare(model, plain)
        return optimizer, schedule, model

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """All losses of a batch, float32 scalars."""
        if self.solver is not None:
            return self._consistency_losses(batch, self.solver)
        noisy = self.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)  # [b, c, h, w]
        taught: Learnt | None = None
        if self.teacher_call is not None:
            with torch.no_grad():
                taught = self.teacher_call(noisy.to(self.dtype), batch.timesteps, **nested(batch.given))
        learnt: Learnt = self.model(noisy, batch.timesteps, **nested(batch.given))
        target = task_target(self.scheduler, batch.latents, batch.noise, batch.timesteps)
        return distill_losses(
            learnt,
            taught,
            target,
            self.names,
            self.config.weights,
            samples=self._sample_weights(batch),
            feature_norm=self.config.feature_norm,
        )

    def _consistency_losses(self, batch: Batch, solver: Solver) -> dict[str, torch.Tensor]:
        """Algorithm 1 of LCM; features, if any, are of the teacher's call with the caption."""
        assert self.teacher_call is not None
        assert batch.guidance is not None
        assert batch.empty is not None
        config, times, earlier = self.config, batch.timesteps, solver.before(batch.timesteps)
        noisy = self.scheduler.add_noise(batch.latents, batch.noise, times)  # [b, c, h, w]
        given = nested(batch.given)
        if config.guidance_embedding:
            given[GUIDANCE] = guidance_embedding(batch.guidance, config.guidance_embedding)  # [b, w]
        with torch.no_grad():
            both = nested(together(torch.cat, [batch.given, batch.empty]))
            taught: Learnt = self.teacher_call(noisy.to(self.dtype).repeat(2, 1, 1, 1), times.repeat(2), **both)
            image, noise = solver.split(guided(taught[0], batch.guidance), noisy, times)
            before = solver.mix(image, noise, earlier)
            with self.accelerator.autocast():
                aim: Learnt = (self.target or self.model)(before, earlier, **given)
            target = solver.answer(aim[0], before, earlier)
        learnt: Learnt = self.model(noisy, times, **given)
        factors = solver.weights(times, config.snr_gamma) if config.snr_gamma else None
        loss = pseudo_huber(solver.answer(learnt[0], noisy, times), target, config.huber_c, factors)
        found = {"loss/total": loss, "loss/consistency": loss}
        if not self.names:
            return found
        halves = [feature.chunk(2)[0] for feature in taught[1]]
        features = feature_losses(learnt[1], halves, self.names, config.feature_norm)
        return found | {"loss/total": loss + config.weights.feature * features["loss/feature"]} | features

    def _sample_weights(self, batch: Batch) -> SampleWeights:
        """min-SNR on task loss and output KD; no task loss where the caption is another image's."""
        snr = None
        if self.config.snr_gamma:
            snr = min_snr_weights(self.scheduler, batch.timesteps, self.config.snr_gamma)
        if not self.config.random_conditioning:
            return SampleWeights(snr, snr)
        matching = batch.matching.float()
        return SampleWeights(matching if snr is None else matching * snr, snr)

    def step(self) -> dict[str, torch.Tensor]:
        """One optimizer step over `accumulation` batches: the mean of each loss, and the gradient's norm unclipped.

        TrainingError, with the weights as they were, when a loss or the norm is not finite. In fp16 such a norm is
        usual: the scaler skips that step and lowers its scale, schedule and average stay, and the norm is left out.
        """
        self.optimizer.zero_grad(set_to_none=True)
        share = 1 / self.config.accumulation
        sums: dict[str, torch.Tensor] = {}
        named: list[tuple[int, int, str]] = []
        for part in range(self.config.accumulation):
            last = part == self.config.accumulation - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                batch = self.batches.next()
                named += batch.named
                losses = self.losses(batch)
                self.accelerator.backward(losses["loss/total"] * share)
            for name, value in losses.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach() * share
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf)
        loss_is_finite, norm_is_finite = torch.stack([sums["loss/total"], norm.detach()]).isfinite().tolist()
        scaler = self.accelerator.scaler
        if not loss_is_finite or (scaler is None and not norm_is_finite):
            raise not_finite(self.done + 1, sums | {"grad_norm": norm.detach()}, named)
        self.optimizer.step()  # of a skipped step this lowers the scaler's scale alone
        self.done += 1
        if not norm_is_finite:
            self.skips.count(self.done, named)
            return sums
        self.skips.end_row()
        self.schedule.step()
        if self.ema is not None:
            self.ema.step(self.parameters)
        if self.target is not None:
            with torch.no_grad():
                torch._foreach_lerp_(self.averages["target"], list(self.parameters), 1 - self.config.target_ema)
        return sums | {"grad_norm": norm.detach()}

    def mean_over_processes(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The mean of scalars over all processes, which must all call this."""
        if self.accelerator.num_processes == 1 or not values:
            return values
        stacked = torch.stack([value.detach().float() for value in values.values()])
        found: Any = self.accelerator.reduce(stacked, reduction="mean")
        return dict(zip(values, found, strict=True))

    @cached_property
    def digests(self) -> dict[str, str]:
        """Of data and model, to tell whether a run goes on with the same."""
        own = "teacher" if self.config.kind.student else "model"
        found = {"data": data_digest(self.data), own: self._model}
        return found | ({"teacher": self._other} if self._other else {})

    def named_parameters(self) -> dict[str, torch.Tensor]:
        """What is trained and, as "ema.<name>" and "target.<name>", its averages, by name."""
        names = [name for name, parameter in self.unet.named_parameters() if parameter.requires_grad]
        found: dict[str, torch.Tensor] = dict(zip(names, self.parameters, strict=True))
        for kind, values in self.averages.items():
            found |= {f"{kind}.{name}": value for name, value in zip(names, values, strict=True)}
        return found

    @property
    def averages(self) -> dict[str, list[Any]]:
        """Averages of the trained weights, in their order: those that become the result, those of the target."""
        found = {"ema": self.ema.shadow_params} if self.ema is not None else {}
        return found | ({"target": list(self.target.parameters())} if self.target is not None else {})

    @contextlib.contextmanager
    def averaged(self) -> Any:
        """Inside, the UNet holds the averaged weights (its own without averaging) and is in eval mode."""
        if self.ema is not None:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
        self.unet.eval()
        try:
            yield self.unet
        finally:
            self.unet.train()
            if self.ema is not None:
                self.ema.restore(self.parameters)

    def finish(self) -> None:
        """Put the averaged weights, if any, into the UNet; TrainingError when they are not finite."""
        check_weights(self.named_parameters(), self.done)
        if self.ema is not None:
            self.ema.copy_to(self.parameters)

    def close(self) -> None:
        """Take the hooks off both UNets, stop reading ahead, and freeze what was trained."""
        self.batches.close()
        if self.teacher is not None:
            self.teacher.close()
        self.student.close()
        self._rounding.close()
        self.unet.eval().requires_grad_(False)
        self.unet.zero_grad(set_to_none=True)
        if self.config.checkpointing:
            self.unet.disable_gradient_checkpointing()


def lr_factor(step: int, config: TrainConfig) -> float:
    """Share of the learning rate after `step` optimizer steps: linear warm-up, then constant, or a line or half a
    cosine down to 0.
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = min((step - config.warmup) / max(config.steps - config.warmup, 1), 1.0)
    shapes = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return shapes[config.schedule]
