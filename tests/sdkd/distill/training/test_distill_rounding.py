"""A student is trained with rounding, and its folder holds what its engines are to round by."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_pipeline
from training_runs import RUN, job, latents, losses, same, trained, trainer, unet_output, weights

from sdkd.distill import TrainConfig
from sdkd.distill.training.log import LOG, read_log
from sdkd.distill.training.rounding import FILE, Start, rounded
from sdkd.distill.training.run import run
from sdkd.distill.training.trainer import Trainer
from sdkd.errors import InputError
from sdkd.models.diffusers_folder import component_digest
from sdkd.models.resolve import load_component
from sdkd.quantization import recording
from sdkd.quantization.calibration import Calibration
from sdkd.quantization.fake import unet_scales
from sdkd.quantization.scheme import Scheme
from sdkd.students.blocks import build_student, copy_unet

EIGHT: dict[str, Any] = {"quantize": "int8", "calibrate_images": 1}


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """Two denoising steps of each image that is drawn for the ranges."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "STEPS", 2)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with rounding and its checkpoints 3 and 4."""
    output = tmp_path_factory.mktemp("rounded") / "student"
    run(job(output, steps=4, save_every=1, ema=0.5, **EIGHT))
    return output


def test_what_is_rounded_by_its_settings() -> None:
    assert TrainConfig().scheme is None
    assert TrainConfig(quantize="int8").scheme == Scheme("u8", 7, outputs=True)
    assert TrainConfig(quantize="int8", weight_bits=8).scheme == Scheme("u8", 8, outputs=True)
    assert TrainConfig(quantize="fp8", objective="consistency").scheme == Scheme("e4m3")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantize": "int4"}, r"precision 'int4' of an engine is unknown: .*the nearest to it is int8"),
        ({"quantize": "fp16"}, r"quantize 'fp16' has more than eight bits: choose int8 or fp8"),
        ({"quantize": "int8", "objective": "lora"}, r"a LoRA leaves its UNet as it is: give it to sdkd distill"),
        ({"weight_bits": 8}, r"weight_bits and calibrate_images say how quantize rounds: add --quantize int8"),
        ({"quantize": "int8", "weight_bits": 3}, r"weight_bits"),
        ({"quantize": "fp8", "weight_bits": 7}, r"weight_bits 7 are of int8, and fp8 has eight: leave them out"),
        ({"quantize": "int8", "calibrate_images": 0}, r"calibrate_images"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig(**settings)


@pytest.mark.parametrize("settings", [{}, {"objective": "consistency", "target_ema": 0.5}, {"precision": "bf16"}])
def test_the_losses_are_of_rounded_predictions_until_the_run_ends(settings: dict[str, Any]) -> None:
    rounds, floats = (trained(latents(), **more, **settings) for more in (EIGHT, {}))
    first, exact = rounds.history[0], floats.history[0]
    assert first["loss/total"] != exact["loss/total"]
    assert abs(first["loss/total"] / exact["loss/total"] - 1) < 0.2  # eight bits are near
    assert first["rounded_layers"] > 10
    assert "rounded_layers" not in exact
    assert not same(weights(rounds.unet), weights(floats.unet))
    assert rounds.calibration is not None
    assert not any("forward" in vars(module) for module in rounds.unet.modules())  # it computes in float again


def test_every_weight_that_is_trained_in_float_gets_a_gradient_with_rounding() -> None:
    found = []
    for settings in ({}, EIGHT):
        pipe = tiny_pipeline()
        config, student = TrainConfig(**{**RUN, **settings}), build_student(pipe.unet, "tiny")
        start = Start(pipe, student, latents(), config, trainer().origin)
        made = Trainer(pipe, student, latents(), config, calibrate=start.calibration if settings else None)
        made.losses(made.batches.next())["loss/total"].backward()
        names = {name for name, value in student.named_parameters() if value.grad is not None and value.grad.any()}
        found.append(names)
        made.close()
    assert found[0] == found[1]


def test_fp8_trains_too() -> None:
    made = trained(latents(), quantize="fp8", calibrate_images=1)
    assert all(torch.isfinite(value).all() for value in weights(made.unet).values())


def test_the_calibration_is_of_the_student_as_training_starts_and_of_the_datas_captions() -> None:
    pipe = tiny_pipeline()
    student = build_student(pipe.unet, "tiny")
    config = TrainConfig(**RUN, quantize="int8", calibrate_images=3)
    made = Start(pipe, student, latents(), config, trainer().origin).calibration()
    assert made.about["prompts"] == ["number 0", "number 2", "number 4"]
    assert (made.about["steps"], made.about["guidance_scale"], made.about["height"]) == (2, 4.0, 64)
    few = TrainConfig(**RUN, quantize="int8", objective="consistency", calibrate_images=1)
    made = Start(pipe, student, latents(), few, trainer().origin).calibration()
    assert (made.about["scheduler"], made.about["steps"], made.about["guidance_scale"]) == ("LCMScheduler", 2, 1.0)


def test_a_run_that_goes_on_gives_the_same_bits(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, again := tmp_path / "student")
    for name in ("model_index.json", "checkpoint-4"):  # as a run that was ended after its third step
        path = again / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run(job(again, steps=4, save_every=1, ema=0.5, resume="auto", **EIGHT))
    assert same(weights(again), weights(finished))
    assert losses(again) == losses(finished)
    assert (again / "unet" / FILE).read_bytes() == (finished / "unet" / FILE).read_bytes()


def test_it_does_not_go_on_with_other_rounding_or_without_its_calibration(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, again := tmp_path / "student")
    newest = again / "checkpoint-4"
    for settings in ({"quantize": "int8", "calibrate_images": 2}, {"quantize": "fp8"}, {}):
        with pytest.raises(InputError, match="is of a run with other settings"):
            run(job(again, steps=6, ema=0.5, resume=newest, **settings))
    (newest / FILE).unlink()
    with pytest.raises(InputError, match="cannot be gone on with"):
        run(job(again, steps=6, ema=0.5, resume=newest, **EIGHT))


def test_the_result_is_a_float_student_with_the_ranges_that_it_was_trained_with(finished: Path) -> None:
    unet = load_component(str(finished), "unet")
    assert unet_output(unet).dtype == torch.float32
    found, before = Calibration.load(finished / "unet" / FILE), Calibration.load(finished / "checkpoint-4" / FILE)
    assert found.weights == component_digest(finished / "unet") != before.weights
    scheme = TrainConfig(**EIGHT).scheme
    assert scheme is not None
    one, other = (unet_scales(unet, calibration, scheme) for calibration in (found, before))
    assert {name: (s.scale, s.zero_point, s.out_scale) for name, s in one.items()} == {
        name: (s.scale, s.zero_point, s.out_scale) for name, s in other.items()
    }
    assert found.about["trained"] == {"weights": before.weights, "scheme": scheme.to_json(), "steps": 4}
    call = found.calls[0]  # of the final weights, in float
    with torch.no_grad():
        answer = unet(torch.from_numpy(call.sample), call.timestep, torch.from_numpy(call.text)).sample
    torch.testing.assert_close(answer, torch.from_numpy(call.prediction), rtol=0, atol=1e-5)


def test_card_and_log_say_it(finished: Path) -> None:
    card = (finished / "README.md").read_text()
    assert "| rounding | forward passes as int8 engines compute (8-bit activations, weights of 7 bits);" in card
    assert read_log(finished / LOG)[-1]["rounded_layers"] > 10


def test_training_through_the_rounding_makes_up_for_it() -> None:
    """Of a copy of the teacher, which only four bits of weights keep from giving what the teacher gives."""
    pipe = tiny_pipeline()
    unet, wanted = copy_unet(pipe.unet), unet_output(pipe.unet)
    config = TrainConfig(**RUN, quantize="int8", weight_bits=4, calibrate_images=1)
    calibration = Start(pipe, unet, latents(), config, trainer().origin).calibration()
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    optimizer, errors = torch.optim.Adam(unet.requires_grad_(True).parameters(), 1e-3), []
    assert config.scheme is not None
    with rounded(unet, calibration, config.scheme):
        for _ in range(12):
            loss = (unet(sample, torch.tensor([10, 700]), text).sample - wanted).square().mean()
            errors.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert errors[-1] < 0.5 * errors[0], errors
