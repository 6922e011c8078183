"""Losses in float32 whatever comes in, each one by name; feature pairs that fit every student and preset."""

from __future__ import annotations

from functools import cache
from typing import Any

import helpers
import pytest
import torch
from diffusers import DDPMScheduler
from torch.nn import functional as F
from training_runs import unet_output

from sdkd.distill.training.losses import (
    FeatureUNet,
    distill_losses,
    mean_squared_error,
    min_snr_weights,
    prediction_type,
    task_target,
)
from sdkd.distill.training.pairs import PAIRS, feature_pairs
from sdkd.errors import ModelError
from sdkd.families import STABLE_DIFFUSION, LossWeights
from sdkd.students.blocks import build_student, meta_unet, student_config


def tensors(seed: int, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, 3, 3, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_difference_overflows_and_no_gradient_vanishes(dtype: torch.dtype) -> None:
    student = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    loss = mean_squared_error(student, torch.full((2, 3), 300.0, dtype=dtype))
    loss.backward()
    assert (loss.dtype, loss.item()) == (torch.float32, 90_000.0)
    assert student.grad is not None
    assert torch.equal(student.grad, torch.full((2, 3), -100.0, dtype=dtype))
    # In the reference at batch 32 the factor 2 / N of up_blocks.2 underflowed in fp16: that pair never learnt.
    feature = torch.zeros(32, 640, 64, 8, dtype=dtype, requires_grad=True)
    mean_squared_error(feature, torch.ones_like(feature) * 100).backward()
    assert feature.grad is not None
    assert feature.grad[0, 0, 0, 0].item() == pytest.approx(2 * -100 / feature.numel(), rel=0.05)


def test_losses_are_weighted_and_named() -> None:
    student, teacher, (target, *_) = tensors(0), tensors(1), tensors(2)
    weights, names = LossWeights(1.0, 0.5, 0.25), ("down_blocks.0", "up_blocks.0")
    found = distill_losses((student[0], student[1:]), (teacher[0], teacher[1:]), target, names, weights)
    pairs = [F.mse_loss(student[index], teacher[index]) for index in (1, 2)]
    task, output = F.mse_loss(student[0], target), F.mse_loss(student[0], teacher[0])
    expected = {
        "loss/total": task + 0.5 * output + 0.25 * (pairs[0] + pairs[1]),
        "loss/task": task,
        "loss/output": output,
        "loss/feature": pairs[0] + pairs[1],  # a sum, not a mean
        "loss/feature/down_blocks.0": pairs[0],
        "loss/feature/up_blocks.0": pairs[1],
    }
    assert list(found) == list(expected)
    torch.testing.assert_close(found, expected)
    with pytest.raises(ModelError, match=r"shapes differ: student \(2, 4\), teacher \(2, 1\)"):
        mean_squared_error(torch.zeros(2, 4), torch.zeros(2, 1))


def test_target_is_noise_or_velocity() -> None:
    latents, noise, _ = tensors(3)
    timesteps = torch.tensor([10, 900])
    epsilon, velocity = DDPMScheduler(), DDPMScheduler(prediction_type="v_prediction")
    assert task_target(epsilon, latents, noise, timesteps) is noise
    signal = epsilon.alphas_cumprod[timesteps].view(2, 1, 1, 1)
    expected = signal.sqrt() * noise - (1 - signal).sqrt() * latents
    torch.testing.assert_close(task_target(velocity, latents, noise, timesteps), expected)
    assert prediction_type({}) == "epsilon"


@pytest.mark.parametrize(
    ("kind", "expected"), [("epsilon", [0.00425362, 1.0, 1.0]), ("v_prediction", [0.00425, 0.5905011, 0.0046601])]
)
def test_min_snr_weights_are_the_papers(kind: str, expected: list[float]) -> None:
    """Signal-to-noise ratios 1175.47, 1.442009, 0.00468192, worked out by hand: min(SNR, 5) / SNR, or / (SNR + 1)."""
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": kind}
    found = min_snr_weights(DDPMScheduler(**settings), torch.tensor([0, 300, 999]), 5.0)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=0)


# Full-size shapes on the meta device: no memory, no time.
FAMILIES: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
}


@cache
def shapes(family: str, student: str | None) -> dict[str, torch.Size]:
    """Shape of every feature that any pair names, of a family's teacher or student."""
    config = FAMILIES[family] if student is None else student_config(FAMILIES[family], student)
    unet = meta_unet(config)
    known = {name for name, _ in unet.named_modules()}
    pairs = [pair for preset in PAIRS.values() for group in preset.values() for pair in group]
    names = sorted({name for pair in pairs for name in pair} & known)
    with torch.device("meta"), torch.no_grad():
        inputs = torch.empty(2, 4, 64, 64), torch.ones(2), torch.empty(2, 77, unet.config.cross_attention_dim)
        _, found = FeatureUNet(unet, names)(*inputs)
    return {name: feature.shape for name, feature in zip(names, found, strict=True)}


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_have_equal_shapes(family: str) -> None:
    alike = {"bk-base": "sd-small", "bk-tiny": "sd-tiny"}  # students of one architecture
    for student in (spec.name for spec in STABLE_DIFFUSION.students):
        for preset in PAIRS:
            pairs, taught = feature_pairs(student, preset), shapes(family, None)
            learnt = shapes(family, alike.get(student, student))
            assert [taught[name] for name, _ in pairs] == [learnt[name] for _, name in pairs], (student, preset)
            assert taught[pairs[0][0]] == (2, 320, 32, 32)


def test_presets_differ_where_the_trainers_differ() -> None:
    counts = {("small", "segmind"): 9, ("small", "bk-sdm"): 8, ("bk-small", "bk-sdm"): 8, ("tiny", "segmind"): 6}
    assert {key: len(feature_pairs(*key)) for key in counts} == counts
    assert ("mid_block", "mid_block") in feature_pairs("small")
    assert ("mid_block", "mid_block") not in feature_pairs("bk-base")
    assert ("up_blocks.0", "down_blocks.2") in feature_pairs("tiny")
    assert ("down_blocks.2.attentions.1.proj_out", "down_blocks.2.attentions.0.proj_out") in feature_pairs("bk-tiny")


def test_output_is_the_unets_and_features_are_in_order() -> None:
    unet = build_student(helpers.tiny_unet(), "tiny")
    model = FeatureUNet(unet, ["up_blocks.2", "down_blocks.0", "down_blocks.2.attentions.0.proj_out"])
    (sample, text), times = (torch.ones(2, 4, 8, 8), torch.ones(2, 5, 32)), torch.tensor([1, 2])
    output, found = model(sample, times, text)
    assert not model._found  # no activation is kept
    assert torch.equal(output, unet(sample, times, encoder_hidden_states=text).sample)
    assert [tuple(feature.shape) for feature in found] == [(2, 16, 8, 8), (2, 16, 4, 4), (2, 32, 2, 2)]
    assert all(feature.requires_grad for feature in found)
    before = unet_output(unet)
    model.close()
    assert torch.equal(unet_output(unet), before)
    assert not any(module._forward_hooks for module in unet.modules())
