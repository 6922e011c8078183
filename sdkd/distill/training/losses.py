"""Task loss, output KD and feature KD, each one and each pair a float32 scalar of its own; where features come from.

    total = task_weight * MSE(student, target) + output_weight * MSE(student, teacher)
          + feature_weight * sum over pairs of MSE(student feature, teacher feature)

Source: BK-SDM (arXiv 2305.15798), equations 2 to 4. Means over all elements; the sum over pairs is a plain sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from sdkd.errors import ModelError
from sdkd.families import LossWeights

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DConditionModel

Learnt = tuple[torch.Tensor, Sequence[torch.Tensor]]  # an output [b, c, h, w] and its features


class FeatureUNet(nn.Module):
    """A UNet whose forward returns its output and the features of chosen modules.

    The features leave through the return value, so the same code serves eager, compiled and data-parallel modules.
    Hooks are set here, before any compilation; `close` removes them, which gives the UNet back as it was.
    """

    def __init__(self, unet: UNet2DConditionModel, modules: Sequence[str]) -> None:
        super().__init__()
        self.unet = unet
        self._found: dict[int, torch.Tensor] = {}
        self._count = len(modules)
        self._handles = [
            unet.get_submodule(name).register_forward_hook(self._keep(index)) for index, name in enumerate(modules)
        ]

    def _keep(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # A down block returns (hidden states after its downsampler, skips); the others return one tensor.
            self._found[index] = output[0] if isinstance(output, tuple) else output

        return hook

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, **conditions: Any
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Noisy latents [b, c, h, w], timesteps [b], text [b, s, d] -> output [b, c, h, w] and features, in order.

        `conditions`: what else the UNet takes, see sdkd.core.conditions.
        """
        self._found.clear()
        output = self.unet(sample, timestep, encoder_hidden_states, **conditions, return_dict=False)[0]
        features = [self._found[index] for index in range(self._count)]
        self._found.clear()  # keep no activation alive between calls
        return output, features

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


@dataclass(frozen=True)
class SampleWeights:
    """Factors per sample [b], float32, on the device: of the task loss, and of output KD; None means 1 for each."""

    task: torch.Tensor | None = None
    output: torch.Tensor | None = None


def mean_squared_error(
    student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """MSE of two tensors of one shape and any dtype, as a float32 scalar; `weights` [b] multiply each sample's.

    In half precision the square of a difference beyond 255 overflows, and the gradient's factor 2 / N underflows.
    """
    if student.shape != teacher.shape:
        raise ModelError(f"shapes differ: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
    if weights is None:
        return F.mse_loss(student.float(), teacher.float())
    return (weights * (student.float() - teacher.float()).square().flatten(1).mean(1)).mean()


def distill_losses(
    student: Learnt,
    teacher: Learnt | None,
    target: torch.Tensor,
    names: Sequence[str],
    weights: LossWeights,
    *,
    samples: SampleWeights | None = None,
    feature_norm: str = "none",
) -> dict[str, torch.Tensor]:
    """All losses of a batch by name, float32 scalars; `loss/total` is the one to differentiate.

    `target` [b, c, h, w] is the noise or velocity, `names` has one name per feature pair. Without a teacher there is
    the task loss alone. With `feature_norm` "variance" each pair is divided by the variance of the teacher's feature.
    """
    samples = samples or SampleWeights()
    task = mean_squared_error(student[0], target, samples.task)
    if teacher is None:
        return {"loss/total": weights.task * task, "loss/task": task}
    output = mean_squared_error(student[0], teacher[0], samples.output)
    features = feature_losses(student[1], teacher[1], names, feature_norm)
    total = weights.task * task + weights.output * output + weights.feature * features["loss/feature"]
    return {"loss/total": total, "loss/task": task, "loss/output": output} | features


def feature_losses(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], names: Sequence[str], norm: str = "none"
) -> dict[str, torch.Tensor]:
    """Feature KD by name: the sum over all pairs, then each; `norm` as `feature_norm` of `distill_losses`."""
    pairs = [_feature_loss(own, other, norm) for own, other in zip(student, teacher, strict=True)]
    single = {f"loss/feature/{name}": value for name, value in zip(names, pairs, strict=True)}
    return {"loss/feature": torch.stack(pairs).sum()} | single


def _feature_loss(student: torch.Tensor, teacher: torch.Tensor, norm: str) -> torch.Tensor:
    loss = mean_squared_error(student, teacher)
    return loss if norm == "none" else loss / teacher.float().var().clamp_min(1e-12)


def prediction_type(scheduler_config: Mapping[str, Any]) -> str:
    """What the teacher predicts, from its scheduler's config; ModelError when it is neither noise nor velocity."""
    kind = scheduler_config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise ModelError(f"the teacher predicts {kind!r}: distillation knows epsilon and v_prediction")
    return str(kind)


def task_target(
    scheduler: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the student should predict [b, c, h, w]: the noise, or the velocity (Salimans and Ho 2022, appendix D)."""
    if prediction_type(scheduler.config) == "epsilon":
        return noise
    velocity: torch.Tensor = scheduler.get_velocity(latents, noise, timesteps)
    return velocity


def min_snr_weights(scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Factors [b] float32 of samples at `timesteps` [b]: min(SNR, gamma) / SNR, or / (SNR + 1) for velocity.

    Source: min-SNR (Hang et al. 2023, arXiv 2303.09556), equation 7 and section 3.4; SNR from diffusers' compute_snr.
    """
    from diffusers.training_utils import compute_snr

    snr = compute_snr(scheduler, timesteps).float()
    divisor = snr + 1 if prediction_type(scheduler.config) == "v_prediction" else snr.clamp_min(1e-12)
    return snr.clamp_max(gamma) / divisor
