"""The trainer: the student learns, the teacher stays, the same seed gives the same weights.

Among these are tests of what the reference trainers get wrong (segmind/distill-sd, BK-SDM); others of them are a wrong
config.json, the teacher's weights in a checkpoint and resuming (test_distill_resume), losses that overflow or vanish in
half precision (test_distill_losses), hooks named by GPU count (test_distill_distributed), captions and images paired by
two listings (test_distill_data), LoRA files that diffusers cannot read (test_distill_lora).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from small_exports import ONE_LEVEL
from torch.nn.parallel import DistributedDataParallel
from training_runs import RUN, same, trained, trainer, weights

from sdkd.distill import TrainConfig, TrainResult, train
from sdkd.distill.data.encode import STATES
from sdkd.distill.data.latents import encode_images
from sdkd.distill.training.log import TrainingLog
from sdkd.distill.training.losses import FeatureUNet
from sdkd.distill.training.trainer import lr_factor
from sdkd.errors import InputError, ModelError, TrainingError
from sdkd.students.blocks import build_student

COLOURS = ("red", "lime", "blue", "white")
OTHERS = ["grad_norm", "lr", "images_per_second", "seconds", "data_wait", "memory_gb"]


def images(count: int = 8) -> list[dict[str, Any]]:
    rows = []
    for index in range(count):
        image = Image.new("RGB", (64, 64), COLOURS[index % 4])
        ImageDraw.Draw(image).ellipse((8, 8, 20 + 4 * index, 40), fill="black")
        rows.append({"image": image, "caption": f"a disc on {COLOURS[index % 4]}"})
    return rows


def run(
    pipe: StableDiffusionPipeline | None = None, folder: Path | None = None, data: Any = None, **settings: Any
) -> TrainResult:
    return trained(data or images(), pipe, folder, **settings)


def test_a_run_trains_the_student_alone_and_logs_every_loss_and_pair(tmp_path: Path) -> None:
    pipe = helpers.tiny_pipeline()
    before, untrained = weights(pipe.unet), weights(build_student(pipe.unet, "small"))
    done = run(pipe, tmp_path / "deep", student="small", steps=5, log_every=2, batch_size=4)
    assert same(weights(pipe.unet), before)
    assert weights(done.unet).keys() == untrained.keys()
    assert not same(weights(done.unet), untrained)
    for unet in (pipe.unet, done.unet):
        assert not unet.training
        assert not any(p.requires_grad or p.grad is not None for p in unet.parameters())
        assert not any(module._forward_hooks for module in unet.modules())
    rows = [json.loads(line) for line in (tmp_path / "deep" / "training.jsonl").read_text().splitlines()]
    assert rows == done.history
    assert [row["step"] for row in rows] == [2, 4, 5]
    pairs = [f"loss/feature/{name}" for name in trainer(student="small").names]
    assert [*rows[0]] == ["step", "loss/total", "loss/task", "loss/output", "loss/feature", *pairs, *OTHERS]
    for row in rows:
        assert row["loss/feature"] == pytest.approx(sum(row[name] for name in pairs), rel=1e-4)
        expected = row["loss/task"] + 0.5 * row["loss/output"] + 0.5 * row["loss/feature"]
        assert row["loss/total"] == pytest.approx(expected, rel=1e-4)


def test_the_same_seed_gives_the_same_weights_however_latents_are_made() -> None:
    latents = encode_images(helpers.tiny_pipeline().vae, images(), size=64)
    first, *others = [
        run(data=data, latents=kind, ema=0.9, **more)
        for data, kind, more in (
            (images(), "memory", {}),
            (latents, "auto", {}),
            (images(), "online", {"workers": 0}),
            (latents, "auto", {"seed": 1}),
        )
    ]
    assert [same(weights(first.unet), weights(other.unet)) for other in others] == [True, True, False]
    keys = [key for key in first.history[0] if key not in OTHERS[2:]]
    for other in others[:2]:
        assert [[row[key] for key in keys] for row in first.history] == [
            [row[key] for key in keys] for row in other.history
        ]


def test_images_keep_their_order_whatever_the_number_of_threads() -> None:
    rows = [{"image": Image.new("RGB", (70 + n, 80), (40 * n, 100, 50)), "caption": f"number {n}"} for n in range(5)]
    one, other = (
        run(data=rows, latents="online", flip=True, crop="random", workers=workers).unet for workers in (0, 4)
    )
    assert same(weights(one), weights(other))


def test_loss_goes_down() -> None:
    history = run(steps=12, batch_size=8, log_every=4, learning_rate=4e-3).history
    assert history[-1]["loss/total"] < 0.7 * history[0]["loss/total"]
    assert history[-1]["loss/output"] < history[0]["loss/output"]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_losses_of_the_teacher_as_its_own_student_are_zero(prediction: str) -> None:
    pipe = helpers.tiny_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction)
    one = trainer(pipe)
    assert one.scheduler.config.prediction_type == prediction
    one.teacher_call = one.student  # identity pairs
    found = one.losses(one.batches.next())
    assert found["loss/output"] == found["loss/feature"] == 0
    assert found["loss/task"] > 0


def test_clipping_clips() -> None:
    for limit, expected in ((0.01, 0.01), (0.0, None)):
        one = trainer(max_grad_norm=limit)
        norm = one.step()["grad_norm"].item()
        assert norm > 1
        clipped = torch.nn.utils.get_total_norm([p.grad for p in one.parameters if p.grad is not None])
        assert clipped.item() == pytest.approx(expected or norm, rel=1e-3)


def test_accumulation_averages() -> None:
    whole, parts = (trainer(accumulation=count, max_grad_norm=0.0) for count in (1, 2))  # nothing is clipped alike
    batch = whole.batches.next()
    whole.batches.next = parts.batches.next = lambda: batch  # type: ignore[method-assign]
    assert whole.step()["loss/total"].item() == pytest.approx(parts.step()["loss/total"].item(), rel=1e-5)
    for one, other in zip(whole.parameters, parts.parameters, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_in_bfloat16_the_teacher_is_frozen_and_never_prepared_and_weights_stay_float32() -> None:
    one = trainer(precision="bf16")
    assert one.teacher is not None
    prepared = [one.accelerator.unwrap_model(model) for model in one.accelerator._models]
    assert prepared == [one.student]  # the reference's list also held the teacher, which save_state then wrote last
    found = one.step()
    assert one.teacher._found == one.student._found == {}  # no activation outlives a step
    for frozen in (one.teacher.unet, one.vae, *one.text.encoders):
        assert not isinstance(frozen, DistributedDataParallel)
        assert (frozen.training, frozen.dtype) == (False, torch.bfloat16)
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in frozen.parameters())
    assert {value.dtype for value in found.values()} == {parameter.dtype for parameter in one.parameters}
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert found["loss/task"].item() == pytest.approx(trainer().step()["loss/task"].item(), rel=0.05)


def test_timesteps_and_captions_vary() -> None:
    one = trainer(batch_size=8, caption_dropout=0.5)
    batches = [one.batches.next() for _ in range(50)]
    timesteps = torch.stack([batch.timesteps for batch in batches])  # [50, 8]
    assert timesteps.min() < 50
    assert timesteps.max() > 950
    assert ((timesteps // 125) == torch.arange(8)).all()  # one of each eighth of the schedule
    empty = one.batches.encode_text([""])[STATES][0]
    share = torch.stack([(batch.given[STATES] == empty).all(2).all(1) for batch in batches]).float().mean()
    assert 0.4 < share < 0.6


def test_ema_is_of_the_student() -> None:
    one = trainer(ema=0.999, learning_rate=1e-2)
    shapes = [shadow.shape for shadow in one.ema.shadow_params]  # the reference's were the teacher's
    assert shapes == [parameter.shape for parameter in one.student.unet.parameters()]
    for _ in range(2):
        one.step()
    raw, averages = weights(one.student.unet), [shadow.clone() for shadow in one.ema.shadow_params]
    one.finish()
    assert all(torch.equal(own, average) for own, average in zip(one.parameters, averages, strict=True))
    assert not same(weights(one.student.unet), raw)


def test_learning_rate_is_counted_in_steps() -> None:
    cosine = TrainConfig(steps=10, warmup=2, accumulation=4)
    assert [round(lr_factor(step, cosine), 3) for step in (0, 1, 2, 6, 10)] == [0.5, 1.0, 1.0, 0.5, 0.0]
    assert lr_factor(9, TrainConfig(steps=10, schedule="constant")) == 1.0
    assert lr_factor(6, TrainConfig(steps=10, warmup=2, schedule="linear")) == 0.5
    rates = [row["lr"] for row in run(steps=4, accumulation=2, learning_rate=1.0e-4).history]
    assert rates == pytest.approx([1e-4 * lr_factor(step, TrainConfig(steps=4)) for step in range(4)])


def test_gradient_checkpointing_changes_neither_losses_nor_gradients() -> None:
    plain, recomputed = trainer(student="small"), trainer(student="small", checkpointing=True)
    batch = plain.batches.next()
    one, other = plain.losses(batch), recomputed.losses(batch)
    torch.testing.assert_close(other, one)
    for losses in (one, other):
        losses["loss/total"].backward()
    torch.testing.assert_close(
        [own.grad for own in recomputed.parameters], [own.grad for own in plain.parameters], rtol=1e-4, atol=1e-5
    )


def test_hooks_set_before_compilation_fire() -> None:
    module = FeatureUNet(UNet2DConditionModel(**ONE_LEVEL), ["down_blocks.0", "up_blocks.0"])
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), torch.randn(2, 5, 32)
    with torch.no_grad():
        expected, found = module(*inputs), compiled(*inputs)
    torch.testing.assert_close(found, expected)
    assert len(found[1]) == 2


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
    neither = trainer(random_conditioning=1.0, caption_dropout=1.0).batches
    batch = neither.next()
    assert batch.matching.all()
    assert torch.equal(batch.given[STATES], neither.encode_text(["", ""])[STATES])


def test_not_finite_stops() -> None:
    pipe = helpers.tiny_pipeline()
    student = build_student(pipe.unet, "tiny")
    with torch.no_grad():
        student.conv_out.bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"loss/output nan, loss/task nan, loss/total nan at step 1, of image \d "):
        train(pipe, student, images(), TrainConfig(**(RUN | {"log_every": 2})))
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
    pipe, tiny = helpers.tiny_pipeline(), TrainConfig(**RUN)
    shared = build_student(pipe.unet, "tiny")
    shared.conv_in = pipe.unet.conv_in
    odd, painting = helpers.tiny_pipeline(), helpers.tiny_pipeline()
    odd.scheduler = DDIMScheduler(prediction_type="sample")
    painting.unet = helpers.tiny_unet(in_channels=9)
    for teacher, student, message in (
        (pipe, helpers.tiny_unet(), r"is not the sd-tiny of this teacher .* build_student"),
        (helpers.tiny_pipeline(student="tiny"), build_student(pipe.unet, "tiny"), "looks like a student already"),
        (pipe, shared, "student and teacher share weights"),
        (odd, build_student(odd.unet, "tiny"), "the teacher predicts 'sample'"),
        (painting, build_student(painting.unet, "tiny"), "takes 9 channels, its VAE gives 4"),
    ):
        with pytest.raises(ModelError, match=message):
            train(teacher, student, images(), tiny)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "steep", "steps": 0, "ema": 1}, r"schedule 'steep' is unknown: .*; steps 0 is .*; ema 1 is "),
        ({"task_weight": 0, "output_weight": 0, "feature_weight": 0}, "all three loss weights are 0"),
        ({"precision": "fp16"}, "precision 'fp16' needs a CUDA device"),
        ({"device": "abacus"}, "device 'abacus' is unknown"),
        ({"learning_rate": float("inf")}, "learning_rate inf is not finite"),
        ({"learning_rate": float("nan")}, "learning_rate nan is not finite"),
        ({"betas": (1.5, 0.9)}, r"betas 1.5 is too large: give a number of at least 0 and below 1"),
        ({"betas": (0.9,)}, r"betas \(0.9,\) are not two"),
        ({"seed": -1}, "seed -1 is too small"),
        ({"seed": 2**64}, "seed 18446744073709551616 is too large"),
        ({"steps": 1.5}, "steps 1.5 is not a whole number"),
        ({"batch_size": 10**9}, "batch_size 1000000000 is too large"),
        ({"lora_rank": 100_000}, "lora_rank 100000 is too large: give a whole number from 1 to 1280"),
        ({"caption_dropout": float("nan")}, "caption_dropout nan is not finite"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(**settings)


def test_weights_and_pairs_default_to_the_students() -> None:
    assert TrainConfig(student="tiny").weights == (1.0, 0.5, 0.5)
    assert TrainConfig(student="bk-tiny", output_weight=0.0).weights == (1.0, 0.0, 1.0)
    assert TrainConfig(student="bk-tiny").pair_preset == "bk-sdm"
    assert TrainConfig(student="tiny", pairs="bk-sdm").to_json()["pairs"] == "bk-sdm"


def test_gpu_half_precision_trains() -> None:
    for precision in ("fp16", "bf16"):
        history = run(steps=20, precision=precision, device="cuda", learning_rate=1e-3, log_every=5).history
        assert history[-1]["loss/total"] < history[0]["loss/total"]
