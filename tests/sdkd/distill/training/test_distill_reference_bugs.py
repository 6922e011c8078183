"""What the reference trainers get wrong (segmind/distill-sd, BK-SDM), each as a test that fails on that bug.

Bugs that have a test elsewhere: a wrong config.json, the teacher's weights in a checkpoint, resuming
(test_distill_resume), losses overflowing in half precision (test_distill_losses), clipping, a teacher as its own
student, losses that are not logged apart, schedules scaled by accumulation (test_distill_trainer), LoRA files that
diffusers cannot read (test_distill_lora), students that cannot be distilled again (test_distill_cli), hooks named by
GPU count (test_distill_distributed), captions and images paired by two listings (test_distill_data).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from diffusers import UNet2DConditionModel
from small_exports import ONE_LEVEL
from torch.nn.parallel import DistributedDataParallel

from sdkd.distill import TrainConfig, train
from sdkd.distill.data.latents import LatentCache
from sdkd.distill.training.features import FeatureUNet
from sdkd.distill.training.trainer import Trainer
from sdkd.students.blocks import build_student

RUN: dict[str, Any] = {"steps": 3, "batch_size": 2, "precision": "fp32", "device": "cpu", "log_every": 1}


def latents(count: int = 6) -> LatentCache:
    mean = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return LatentCache(mean, torch.full_like(mean, 0.1), [f"number {index}" for index in range(count)])


def trainer(**settings: Any) -> Trainer:
    pipe = helpers.tiny_pipeline()
    config = TrainConfig(**(RUN | settings))
    return Trainer(pipe, build_student(pipe.unet, config.student), latents(), config)


def test_the_teacher_is_frozen_never_prepared_and_in_compute_precision() -> None:
    one = trainer(precision="bf16")
    assert one.teacher is not None
    prepared = [one.accelerator.unwrap_model(model) for model in one.accelerator._models]
    assert prepared == [one.student]  # the reference's list also held the teacher, which save_state then wrote last
    assert not any(isinstance(model, DistributedDataParallel) for model in (one.teacher, one.vae, one.text_encoder))
    for frozen in (one.teacher.unet, one.vae, one.text_encoder):
        assert not frozen.training
        assert frozen.dtype == torch.bfloat16
        assert not any(parameter.requires_grad for parameter in frozen.parameters())
    one.step()
    assert all(parameter.grad is None for parameter in one.teacher.unet.parameters())


def test_the_ema_is_built_from_the_student() -> None:
    one = trainer(ema=0.9)
    assert [tuple(shadow.shape) for shadow in one.ema.shadow_params] == [
        tuple(parameter.shape) for parameter in one.student.unet.parameters()
    ]
    one.step()  # the reference raised here: its EMA had the teacher's shapes
    assert one.ema.optimization_step == 1


def test_every_feature_pair_gets_a_gradient_in_half_precision() -> None:
    # In the reference at batch 32 the factor 2 / N of up_blocks.2 underflowed in fp16: that pair never learnt.
    feature = torch.zeros(32, 640, 64, 8, dtype=torch.float16, requires_grad=True)
    from sdkd.distill.training.losses import mean_squared_error

    mean_squared_error(feature, torch.ones_like(feature) * 100).backward()
    expected = 2 * -100 / feature.numel()
    assert feature.grad is not None
    assert feature.grad.float().mean().item() == pytest.approx(expected, rel=0.05)


def test_no_activation_outlives_a_step() -> None:
    one = trainer()
    one.step()
    assert one.teacher is not None
    assert one.teacher._found == {}
    assert one.student._found == {}


def test_features_are_the_same_with_gradient_checkpointing() -> None:
    plain, recomputed = trainer(student="small"), trainer(student="small", checkpointing=True)
    batch = plain.batches.next()
    for name, value in plain.losses(batch).items():
        torch.testing.assert_close(recomputed.losses(batch)[name], value)
    losses = recomputed.losses(batch)
    losses["loss/total"].backward()
    plain.losses(batch)["loss/total"].backward()
    for one, other in zip(plain.parameters, recomputed.parameters, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_hooks_set_before_compilation_fire() -> None:
    module = FeatureUNet(UNet2DConditionModel(**ONE_LEVEL), ["down_blocks.0", "up_blocks.0"])
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.tensor([10, 700]),
        torch.randn(2, 5, 32, generator=generator),
    )
    with torch.no_grad():
        expected, found = module(*inputs), compiled(*inputs)
    torch.testing.assert_close(found, expected)
    assert len(found[1]) == 2


def test_validation_comes_by_steps_not_epochs(tmp_path: Path) -> None:
    pipe = helpers.tiny_pipeline()
    settings = RUN | {"steps": 4, "accumulation": 2, "prompts": ["x"], "sample_every": 2, "sample_steps": 1}
    train(pipe, build_student(pipe.unet, "tiny"), latents(), TrainConfig(**settings), folder=tmp_path)
    names = sorted(path.name for path in (tmp_path / "samples").glob("*.png"))
    assert names == ["step-000002.png", "step-000004.png"]


def test_random_conditioning_keeps_the_task_loss_to_matching_captions() -> None:
    one = trainer(batch_size=6, random_conditioning=1.0, caption_dropout=0.0)
    batch = one.batches.next()
    assert not batch.matching.any()
    losses = one.losses(batch)
    assert losses["loss/task"] == 0
    assert losses["loss/output"] > 0
    half = trainer(batch_size=6, random_conditioning=0.5, caption_dropout=0.2)
    seen = torch.cat([half.batches.next().matching for _ in range(40)]).float().mean()
    assert 0.5 < seen < 0.7  # 1 - 0.5 * 0.8


def test_images_keep_their_order_whatever_the_number_of_threads(tmp_path: Path) -> None:
    rows = [{"image": _square(index), "caption": f"number {index}"} for index in range(5)]
    results = []
    for workers in (0, 4):
        pipe = helpers.tiny_pipeline()
        config = TrainConfig(**RUN, latents="online", flip=True, crop="random", workers=workers)
        results.append(train(pipe, build_student(pipe.unet, "tiny"), rows, config).unet.conv_in.weight)
    assert torch.equal(results[0], results[1])


def _square(index: int) -> Any:
    from PIL import Image

    return Image.new("RGB", (70 + index, 80), (40 * index, 100, 50))
