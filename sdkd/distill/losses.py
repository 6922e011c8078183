"""Task loss, output KD and feature KD: each one and each pair a float32 scalar of its own.

    total = task_weight * MSE(student, target) + output_weight * MSE(student, teacher)
          + feature_weight * sum over pairs of MSE(student feature, teacher feature)

Source: BK-SDM (arXiv 2305.15798), equations 2 to 4. Means over all elements; the sum over pairs is a plain sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from sdkd.errors import ModelError
from sdkd.students import LossWeights

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

PREDICTION_TYPES = ("epsilon", "v_prediction")


def mean_squared_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """MSE of two tensors of one shape and any dtype, as a float32 scalar.

    In half precision the square of a difference beyond 255 overflows, and the gradient's factor 2 / N underflows.
    """
    if student.shape != teacher.shape:
        raise ModelError(f"shapes differ: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
    return F.mse_loss(student.float(), teacher.float())


def distill_losses(
    student: tuple[torch.Tensor, Sequence[torch.Tensor]],
    teacher: tuple[torch.Tensor, Sequence[torch.Tensor]],
    target: torch.Tensor,
    names: Sequence[str],
    weights: LossWeights,
) -> dict[str, torch.Tensor]:
    """All losses of a batch by name, float32 scalars; `loss/total` is the one to differentiate.

    `student` and `teacher` are an output [b, c, h, w] and its features, `target` [b, c, h, w] the noise or velocity,
    `names` one name per feature pair.
    """
    task = mean_squared_error(student[0], target)
    output = mean_squared_error(student[0], teacher[0])
    pairs = [mean_squared_error(own, other) for own, other in zip(student[1], teacher[1], strict=True)]
    feature = torch.stack(pairs).sum()
    total = weights.task * task + weights.output * output + weights.feature * feature
    single = {f"loss/feature/{name}": value for name, value in zip(names, pairs, strict=True)}
    return {"loss/total": total, "loss/task": task, "loss/output": output, "loss/feature": feature} | single


def prediction_type(scheduler_config: Mapping[str, Any]) -> str:
    """What the teacher predicts, from its scheduler's config; ModelError when it is neither noise nor velocity."""
    kind = scheduler_config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise ModelError(f"the teacher predicts {kind!r}: distillation knows {' and '.join(PREDICTION_TYPES)}")
    return str(kind)


def task_target(
    scheduler: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the task loss asks for, [b, c, h, w]: the noise, or for v-prediction the velocity (Salimans & Ho 2022)."""
    if prediction_type(scheduler.config) == "epsilon":
        return noise
    return scheduler.get_velocity(latents, noise, timesteps)
