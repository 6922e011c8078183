"""The trainer: the student learns, the teacher stays, the same seed gives the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw

from sdkd.distill import TrainConfig, TrainResult, train
from sdkd.distill.data.latents import LatentCache, encode_images
from sdkd.distill.training.log import TrainingLog
from sdkd.distill.training.trainer import Trainer, lr_factor
from sdkd.errors import InputError, ModelError, TrainingError
from sdkd.students.blocks import build_student

COLOURS = ("red", "lime", "blue", "white")
RUN: dict[str, Any] = {"steps": 3, "batch_size": 4, "precision": "fp32", "device": "cpu"}
OTHERS = ["grad_norm", "lr", "images_per_second", "seconds", "data_wait", "memory_gb"]


def images(count: int = 8) -> list[dict[str, Any]]:
    rows = []
    for index in range(count):
        image = Image.new("RGB", (64, 64), COLOURS[index % 4])
        ImageDraw.Draw(image).ellipse((8, 8, 20 + 4 * index, 40), fill="black")
        rows.append({"image": image, "caption": f"a disc on {COLOURS[index % 4]}"})
    return rows


def run(pipe: StableDiffusionPipeline | None = None, folder: Path | None = None, **settings: Any) -> TrainResult:
    pipe = pipe or helpers.tiny_pipeline()
    config = TrainConfig(**(RUN | {"log_every": 1} | settings))
    return train(pipe, build_student(pipe.unet, config.student), images(), config, folder=folder)


def trainer(pipe: StableDiffusionPipeline | None = None, **settings: Any) -> Trainer:
    pipe = pipe or helpers.tiny_pipeline()
    config = TrainConfig(**(RUN | settings))
    mean = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    data = LatentCache(mean, torch.full_like(mean, 0.1), [f"number {index}" for index in range(8)])
    return Trainer(pipe, build_student(pipe.unet, config.student), data, config)


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_teacher_is_untouched_and_student_is_not() -> None:
    pipe = helpers.tiny_pipeline()
    before, untrained = weights(pipe.unet), weights(build_student(pipe.unet, "small"))
    done = run(pipe, student="small")
    assert same(weights(pipe.unet), before)
    assert weights(done.unet).keys() == untrained.keys()
    assert not same(weights(done.unet), untrained)
    for unet in (pipe.unet, done.unet):
        assert not unet.training
        assert not any(p.requires_grad or p.grad is not None for p in unet.parameters())
        assert not any(module._forward_hooks for module in unet.modules())


def test_same_seed_gives_the_same_weights() -> None:
    first, again, other = run(ema=0.9), run(ema=0.9), run(ema=0.9, seed=1)
    assert same(weights(first.unet), weights(again.unet))
    assert not same(weights(first.unet), weights(other.unet))
    keys = [key for key in first.history[0] if key not in OTHERS[2:]]
    assert [[row[key] for key in keys] for row in first.history] == [
        [row[key] for key in keys] for row in again.history
    ]


def test_latents_made_before_give_the_same_weights() -> None:
    pipe = helpers.tiny_pipeline()
    latents = encode_images(pipe.vae, images(), size=64)
    students = [
        train(pipe, build_student(pipe.unet, "tiny"), data, TrainConfig(**RUN, latents=kind)).unet
        for data, kind in ((images(), "memory"), (latents, "auto"), (images(), "online"))
    ]
    assert same(weights(students[0]), weights(students[1]))
    assert same(weights(students[0]), weights(students[2]))


def test_loss_goes_down() -> None:
    history = run(steps=12, batch_size=8, log_every=4, learning_rate=4e-3).history
    assert history[-1]["loss/total"] < 0.7 * history[0]["loss/total"]
    assert history[-1]["loss/output"] < history[0]["loss/output"]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_losses_of_the_teacher_as_its_own_student_are_zero(prediction: str) -> None:
    one = trainer()
    one.teacher_call = one.student  # identity pairs
    one.scheduler.register_to_config(prediction_type=prediction)
    found = one.losses(one.batches.next())
    assert found["loss/output"] == found["loss/feature"] == 0
    assert found["loss/task"] > 0


def test_log_has_every_loss_and_every_pair(tmp_path: Path) -> None:
    done = run(student="small", steps=5, log_every=2, folder=tmp_path / "deep")
    rows = [json.loads(line) for line in (tmp_path / "deep" / "training.jsonl").read_text().splitlines()]
    assert rows == done.history
    assert [row["step"] for row in rows] == [2, 4, 5]
    pairs = [f"loss/feature/{name}" for name in one_names("small")]
    losses = ["loss/total", "loss/task", "loss/output", "loss/feature"]
    assert [*rows[0]] == ["step", *losses, *pairs, *OTHERS]
    for row in rows:
        assert row["loss/feature"] == pytest.approx(sum(row[name] for name in pairs), rel=1e-4)
        expected = row["loss/task"] + 0.5 * row["loss/output"] + 0.5 * row["loss/feature"]
        assert row["loss/total"] == pytest.approx(expected, rel=1e-4)


def one_names(student: str) -> list[str]:
    return trainer(student=student).names


def test_clipping_clips() -> None:
    one = trainer(max_grad_norm=0.01)
    norm = one.step()["grad_norm"]
    clipped = torch.nn.utils.get_total_norm([p.grad for p in one.parameters if p.grad is not None])
    assert norm > 1
    assert clipped.item() == pytest.approx(0.01, rel=1e-3)
    free = trainer(max_grad_norm=0.0)
    norm = free.step()["grad_norm"]
    unclipped = torch.nn.utils.get_total_norm([p.grad for p in free.parameters if p.grad is not None])
    assert unclipped.item() == pytest.approx(norm.item(), rel=1e-5)


def test_accumulation_averages() -> None:
    whole, parts = trainer(batch_size=4), trainer(batch_size=4, accumulation=2)
    batch = whole.batches.next()
    whole.batches.next = parts.batches.next = lambda: batch  # type: ignore[method-assign]
    assert whole.step()["loss/total"].item() == pytest.approx(parts.step()["loss/total"].item(), rel=1e-5)
    for one, other in zip(whole.parameters, parts.parameters, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_bfloat16_keeps_losses_and_weights_in_float32() -> None:
    one = trainer(precision="bf16")
    found = one.step()
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert one.teacher is not None
    assert {one.teacher.unet.dtype, one.vae.dtype, one.text_encoder.dtype} == {torch.bfloat16}
    assert {parameter.dtype for parameter in one.parameters} == {torch.float32}
    assert found["loss/task"].item() == pytest.approx(trainer().step()["loss/task"].item(), rel=0.05)


def test_timesteps_and_captions_vary() -> None:
    one = trainer(batch_size=8, caption_dropout=0.5)
    batches = [one.batches.next() for _ in range(50)]
    timesteps = torch.stack([batch.timesteps for batch in batches])  # [50, 8]
    assert timesteps.min() < 50
    assert timesteps.max() > 950
    assert ((timesteps // 125) == torch.arange(8)).all()  # one of each eighth of the schedule
    empty = one.batches.encode_text([""])[0]
    share = torch.stack([(batch.text == empty).all(2).all(1) for batch in batches]).float().mean()
    assert 0.4 < share < 0.6


def test_ema_is_of_the_student() -> None:
    one = trainer(ema=0.999, learning_rate=1e-2)
    for _ in range(3):
        one.step()
    raw = weights(one.student.unet)
    one.finish()
    averaged = weights(one.student.unet)
    assert averaged.keys() == raw.keys()
    assert not same(averaged, raw)


def test_learning_rate_is_counted_in_steps() -> None:
    cosine = TrainConfig(steps=10, warmup=2, accumulation=4)
    assert [round(lr_factor(step, cosine), 3) for step in (0, 1, 2, 6, 10)] == [0.5, 1.0, 1.0, 0.5, 0.0]
    assert lr_factor(9, TrainConfig(steps=10, schedule="constant")) == 1.0
    assert lr_factor(6, TrainConfig(steps=10, warmup=2, schedule="linear")) == 0.5
    rates = [row["lr"] for row in run(steps=4, accumulation=2, learning_rate=1.0e-4).history]
    assert rates == pytest.approx([1e-4 * lr_factor(step, TrainConfig(steps=4)) for step in range(4)])


def test_not_finite_stops() -> None:
    pipe = helpers.tiny_pipeline()
    student = build_student(pipe.unet, "tiny")
    with torch.no_grad():
        student.conv_out.bias.fill_(float("nan"))
    config = TrainConfig(**(RUN | {"batch_size": 2, "log_every": 2}))
    with pytest.raises(TrainingError, match=r"loss/output nan, loss/task nan, loss/total nan at step 1, of image \d "):
        train(pipe, student, images(), config)
    assert not any(module._forward_hooks for module in pipe.unet.modules())


def test_the_log_means_what_each_value_was_counted_for() -> None:
    """A step that fp16 skipped has losses and no gradient norm; what is not finite never reaches JSON."""
    log = TrainingLog()
    log.add({"loss/total": torch.tensor(2.0), "grad_norm": torch.tensor(3.0)}, 1)
    log.add({"loss/total": torch.tensor(4.0), "odd": torch.tensor(float("inf"))}, 1)
    again = TrainingLog()
    again.restore(json.loads(json.dumps(log.state(), allow_nan=False)))
    for one in (log, again):
        record = one.write(2, 0.1)
        assert (record["loss/total"], record["grad_norm"]) == (3.0, 3.0)
        assert "odd" not in record


def test_models_must_belong_together() -> None:
    pipe = helpers.tiny_pipeline()
    config = TrainConfig(**(RUN | {"steps": 1}))
    with pytest.raises(ModelError, match=r"is not the sd-tiny of this teacher .* build_student"):
        train(pipe, helpers.tiny_unet(), images(), config)  # a teacher as its own student
    with pytest.raises(ModelError, match="looks like a student already"):
        train(helpers.tiny_pipeline(student="tiny"), build_student(pipe.unet, "tiny"), images(), config)
    shared = build_student(pipe.unet, "tiny")
    shared.conv_in = pipe.unet.conv_in
    with pytest.raises(ModelError, match="student and teacher share weights"):
        train(pipe, shared, images(), config)
    pipe.scheduler = DDIMScheduler(prediction_type="sample")
    with pytest.raises(ModelError, match="the teacher predicts 'sample'"):
        train(pipe, build_student(pipe.unet, "tiny"), images(), config)


def test_inpainting_teacher_is_refused() -> None:
    pipe = helpers.tiny_pipeline()
    pipe.unet = helpers.tiny_unet(in_channels=9)
    with pytest.raises(ModelError, match="takes 9 channels, its VAE gives 4"):
        run(pipe)


def test_settings_are_checked_together() -> None:
    with pytest.raises(InputError, match=r"schedule 'steep' is unknown: .*; steps 0 is too small.*; ema 1 is too l"):
        TrainConfig(schedule="steep", steps=0, ema=1)
    with pytest.raises(InputError, match="all three loss weights are 0"):
        TrainConfig(task_weight=0, output_weight=0, feature_weight=0)
    with pytest.raises(InputError, match="precision 'fp16' trains on CUDA devices only"):
        run(precision="fp16")
    with pytest.raises(InputError, match="device 'abacus' is unknown"):
        run(device="abacus")


def test_weights_and_pairs_default_to_the_students() -> None:
    assert TrainConfig(student="tiny").weights == (1.0, 0.5, 0.5)
    assert TrainConfig(student="bk-tiny", output_weight=0.0).weights == (1.0, 0.0, 1.0)
    assert TrainConfig(student="bk-tiny").pair_preset == "bk-sdm"
    assert TrainConfig(student="tiny", pairs="bk-sdm").to_json()["pairs"] == "bk-sdm"


def test_v_prediction_teacher_trains() -> None:
    pipe = helpers.tiny_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    assert run(pipe, steps=2).steps == 2


@pytest.mark.gpu
def test_half_precision_on_a_gpu() -> None:
    for precision in ("fp16", "bf16"):
        history = run(steps=20, precision=precision, device="cuda", learning_rate=1e-3, log_every=5).history
        assert history[-1]["loss/total"] < history[0]["loss/total"]
