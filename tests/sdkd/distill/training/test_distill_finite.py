"""NaN and infinity in training: the run stops before they reach a weight, and fp16's skipped steps are no steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from PIL import Image
from training_runs import RUN, latents, trainer

from sdkd.distill import TrainConfig, train
from sdkd.distill.training.checkpoint import save_checkpoint
from sdkd.distill.training.finite import NotFiniteError
from sdkd.distill.training.record import checkpoints, read_record
from sdkd.distill.training.trainer import Trainer
from sdkd.errors import TrainingError
from sdkd.students.blocks import build_student

NAN = float("nan")


def values(one: Trainer) -> list[torch.Tensor]:
    return [value.detach().clone() for value in one.named_parameters().values()]


def break_gradient(parameter: torch.nn.Parameter, when: list[bool], value: float = NAN) -> None:
    """Make a parameter's gradient `value` in the backward passes whose entry in `when` is true."""
    parameter.register_hook(lambda gradient: torch.full_like(gradient, value) if when.pop(0) else gradient)


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path: Path) -> None:
    pipe = helpers.tiny_pipeline()
    student = build_student(pipe.unet, "tiny")
    break_gradient(student.conv_in.weight.requires_grad_(), [False, False, True])
    config = TrainConfig(**(RUN | {"steps": 6, "save_every": 2, "caption_dropout": 0.0}))
    with pytest.raises(TrainingError, match=r"^grad_norm nan at step 3, of image \d at timestep") as found:
        train(pipe, student, latents(), config, folder=tmp_path)
    message = str(found.value)
    assert message.count(" at timestep ") == 2
    assert "('number " in message
    last = tmp_path / "checkpoint-2"
    said = f"{str(last)!r} is finite and kept: go on with --learning-rate 1e-05 from the weights of {str(last)!r}"
    assert said in message
    assert f"--init {last} --output {last.parent}-2" in message
    assert checkpoints(tmp_path) == [last]
    assert student.conv_in.weight.isfinite().all()
    assert [json.loads(line)["step"] for line in (tmp_path / "training.jsonl").read_text().splitlines()] == [1, 2]


def test_a_poisoned_checkpoint_is_never_written(tmp_path: Path) -> None:
    one = trainer(ema=0.5)
    one.step()
    first = save_checkpoint(one, tmp_path)
    for tensor, name in (
        (one.parameters[3], next(name for at, name in enumerate(one.named_parameters()) if at == 3)),
        (one.ema.shadow_params[0], "ema.conv_in.weight"),
        (one.optimizer.state[one.parameters[1]]["exp_avg_sq"], "1.exp_avg_sq"),
    ):
        before = tensor.detach().clone()
        tensor.data.view(-1)[0] = NAN
        one.done = 2
        with pytest.raises(NotFiniteError, match=rf"1 tensors hold NaN or infinity after step 2 \(first: {name}\)"):
            save_checkpoint(one, tmp_path)
        tensor.data.copy_(before)
    assert checkpoints(tmp_path) == [first]
    assert save_checkpoint(one, tmp_path).name == "checkpoint-2"


def fp16_on_a_cpu(**settings: Any) -> Trainer:
    """A trainer whose gradients are scaled as they are in fp16, which itself needs a GPU."""
    one = trainer(**settings)
    accelerator: Any = one.accelerator
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=1024.0), True
    accelerator.state._mixed_precision = "fp16"
    accelerator._optimizers[:] = [AcceleratedOptimizer(one.optimizer.optimizer, scaler=accelerator.scaler)]
    one.optimizer = accelerator._optimizers[0]
    return one


def test_validation_images_that_are_not_finite_are_named_and_not_drawn_black(tmp_path: Path) -> None:
    pipe = helpers.tiny_pipeline()
    pipe.vae.decoder.conv_out.bias.data.fill_(NAN)
    config = TrainConfig(**(RUN | {"steps": 1, "prompts": ("a", "b"), "sample_steps": 1}))
    done = train(pipe, build_student(pipe.unet, "tiny"), latents(), config, folder=tmp_path)
    assert "step 1: the validation images of 'a', 'b' are not finite (NaN or infinity), and a cross" in done.notes[0]
    with Image.open(tmp_path / "samples" / "step-000001.png") as sheet:
        assert sheet.size == (128, 64)
        assert (sheet.getpixel((32, 10)), sheet.getpixel((96, 32))) == ((255, 255, 255), (255, 0, 0))


def test_fp16_skips_a_step_with_schedule_and_average(tmp_path: Path) -> None:
    one = fp16_on_a_cpu(ema=0.9, warmup=4)
    break_gradient(one.parameters[0], [False, True, False] + [False] * 20, float("inf"))
    one.step()
    before, rate = values(one), one.learning_rate
    found = one.step()
    assert "grad_norm" not in found
    assert found["loss/total"].isfinite()
    assert all(torch.equal(value, old) for value, old in zip(values(one), before, strict=True))
    assert (one.done, one.learning_rate, one.ema.optimization_step) == (2, rate, 1)
    assert (one.skips.total, one.skips.row) == (1, 1)
    assert one.accelerator.scaler.get_scale() == 512.0
    assert read_record(save_checkpoint(one, tmp_path))["skipped"] == {"total": 1, "row": 1}
    one.step()
    assert (one.done, one.ema.optimization_step, one.skips.total, one.skips.row) == (3, 2, 1, 0)
    assert one.learning_rate > rate
    break_gradient(one.parameters[1], [True] * 20)
    for _ in range(19):
        one.step()
    with pytest.raises(NotFiniteError, match="in 20 steps of fp16 in a row, the last one at step 23, of image"):
        one.step()
