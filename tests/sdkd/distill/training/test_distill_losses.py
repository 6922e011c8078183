"""Losses: in float32 whatever comes in, zero where nothing differs, each one by name."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from torch.nn import functional as F

from sdkd.distill.training.losses import (
    distill_losses,
    mean_squared_error,
    min_snr_weights,
    prediction_type,
    task_target,
)
from sdkd.errors import ModelError
from sdkd.students.blocks import LossWeights

NAMES = ("down_blocks.0", "up_blocks.0")


def tensors(seed: int, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, 3, 3, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_difference_of_300_is_finite(dtype: torch.dtype) -> None:
    student = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    loss = mean_squared_error(student, torch.full((2, 3), 300.0, dtype=dtype))
    loss.backward()
    assert (loss.dtype, loss.item()) == (torch.float32, 90_000.0)
    assert student.grad is not None
    assert torch.equal(student.grad, torch.full((2, 3), -100.0, dtype=dtype))


def test_shapes_must_agree() -> None:
    with pytest.raises(ModelError, match=r"shapes differ: student \(2, 4\), teacher \(2, 1\)"):
        mean_squared_error(torch.zeros(2, 4), torch.zeros(2, 1))


def test_losses_are_weighted_and_named() -> None:
    student, teacher, (target, *_) = tensors(0), tensors(1), tensors(2)
    weights = LossWeights(1.0, 0.5, 0.25)
    found = distill_losses((student[0], student[1:]), (teacher[0], teacher[1:]), target, NAMES, weights)
    pairs = [F.mse_loss(student[index], teacher[index]) for index in (1, 2)]
    task, output = F.mse_loss(student[0], target), F.mse_loss(student[0], teacher[0])
    assert list(found) == [
        "loss/total",
        "loss/task",
        "loss/output",
        "loss/feature",
        "loss/feature/down_blocks.0",
        "loss/feature/up_blocks.0",
    ]
    torch.testing.assert_close(found["loss/feature"], pairs[0] + pairs[1])  # a sum, not a mean
    torch.testing.assert_close(found["loss/total"], task + 0.5 * output + 0.25 * (pairs[0] + pairs[1]))


def test_distillation_losses_vanish_for_the_teacher_itself() -> None:
    teacher, (target, *_) = tensors(1), tensors(2)
    same = (teacher[0], teacher[1:])
    found = distill_losses(same, same, target, NAMES, LossWeights(1.0, 1.0, 1.0))
    assert found["loss/output"] == found["loss/feature"] == 0
    assert found["loss/total"] == found["loss/task"] > 0


def test_target_is_noise_or_velocity() -> None:
    latents, noise, _ = tensors(3)
    timesteps = torch.tensor([10, 900])
    epsilon, velocity = DDPMScheduler(), DDPMScheduler(prediction_type="v_prediction")
    assert task_target(epsilon, latents, noise, timesteps) is noise
    signal = epsilon.alphas_cumprod[timesteps].view(2, 1, 1, 1)
    expected = signal.sqrt() * noise - (1 - signal).sqrt() * latents
    torch.testing.assert_close(task_target(velocity, latents, noise, timesteps), expected)


def test_unknown_prediction_type() -> None:
    with pytest.raises(ModelError, match="predicts 'sample': distillation knows epsilon and v_prediction"):
        prediction_type({"prediction_type": "sample"})
    assert prediction_type({}) == "epsilon"


@pytest.mark.parametrize(
    ("kind", "expected"), [("epsilon", [0.00425362, 1.0, 1.0]), ("v_prediction", [0.00425, 0.5905011, 0.0046601])]
)
def test_min_snr_weights_are_the_papers(kind: str, expected: list[float]) -> None:
    """Signal-to-noise ratios 1175.47, 1.442009, 0.00468192, worked out by hand: min(SNR, 5) / SNR, or / (SNR + 1)."""
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": kind}
    found = min_snr_weights(DDPMScheduler(**settings), torch.tensor([0, 300, 999]), 5.0)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=0)
