"""Schedulers: by name, steps that they cannot do, and libraries' defaults that are not this model's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import helpers
import pytest
import torch
from diffusers.utils import dummy_torch_and_torchsde_objects
from graph_bundles import graph_bundle

from engines.modules.base import run_split
from engines.sessions.checks import Profiles
from engines.sessions.ranges import check_sizes
from sdkd.core.contract import Contract, TensorSpec
from sdkd.distill.data.encode import STATES, TextParts, encode_captions, too_long
from sdkd.distill.data.latents import LatentCache
from sdkd.distill.training.config import TrainConfig
from sdkd.distill.training.loop import train
from sdkd.distill.training.trainer import Trainer
from sdkd.errors import InputError, MissingExtraError, ModelError, RangeError
from sdkd.models.clip_tokenizer import bounded, token_limit
from sdkd.models.resolve import load_eager, load_rest
from sdkd.models.schedulers import (
    SCHEDULERS,
    check_steps,
    scheduler_class,
    scheduler_like,
    seed_scheduler,
    set_scheduler,
)
from sdkd.students.blocks import build_student

CONFIG = TrainConfig(steps=1, batch_size=2, precision="fp32", device="cpu", log_every=1, caption_dropout=0.0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_name_works(name: str) -> None:
    pipe = SimpleNamespace(scheduler=diffusers.PNDMScheduler(beta_schedule="scaled_linear"))
    if name == "dpm-sde":
        pytest.importorskip("torchsde")
    set_scheduler(pipe, name)
    check_steps(pipe.scheduler, 5)
    with pytest.raises(InputError, match=r"steps 1001.*1000"):
        check_steps(pipe.scheduler, 1001)


def test_a_scheduler_whose_package_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = dummy_torch_and_torchsde_objects.DPMSolverSDEScheduler  # what diffusers has without the package
    monkeypatch.setattr(diffusers, "DPMSolverSDEScheduler", stand_in)
    monkeypatch.setitem(sys.modules, "torchsde", None)
    with pytest.raises(MissingExtraError, match=r"'dpm-sde' needs the package 'torchsde'.*sdkd\[sde\]"):
        scheduler_class("dpm-sde")


def test_what_does_not_draw_with_this_noise_schedule_is_refused() -> None:
    others = ("FlowMatchEulerDiscrete", "EDMEuler", "CogVideoXDDIM", "DDIMInverse")
    for name in (f"{other}Scheduler" for other in others):
        with pytest.raises(InputError, match=f"scheduler '{name}' is of another family"):
            scheduler_class(name)
    pipe = helpers.tiny_pipeline()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()  # a model's own
    with pytest.raises(ModelError, match="the scheduler FlowMatchEulerDiscreteScheduler has no noise schedule"):
        check_steps(pipe.scheduler, 5)
    with pytest.raises(ModelError, match="the scheduler FlowMatchEulerDiscreteScheduler has no noise schedule"):
        Trainer(pipe, build_student(pipe.unet, "tiny"), latents(["a", "b"]), CONFIG)
    with pytest.raises(InputError, match=r"LCMScheduler cannot do 60 steps .*give another number or --scheduler"):
        check_steps(diffusers.LCMScheduler(), 60)


def test_a_scheduler_with_noise_of_its_own_gets_the_seeds() -> None:
    scheduler = SimpleNamespace(noise_sampler_seed=None)
    seed_scheduler(scheduler, [3, 4])
    assert scheduler.noise_sampler_seed == [3, 4]


def latents(captions: list[str]) -> LatentCache:
    mean = torch.randn(len(captions), 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return LatentCache(mean, torch.full_like(mean, 0.1), captions)


@pytest.mark.parametrize("kind", ["LCMScheduler", "TCDScheduler", "DDIMScheduler"])
def test_defaults_of_the_published_class_stay(kind: str, tmp_path: Path) -> None:
    """Of a config that leaves its class's defaults out, as some published models do."""
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": kind}))
    pipe = helpers.tiny_pipeline()
    pipe.scheduler = getattr(diffusers, kind).from_pretrained(tmp_path)
    betas = pipe.scheduler.betas.clone()
    trainer = Trainer(pipe, build_student(pipe.unet, "tiny"), latents(["a", "b"]), CONFIG)
    assert torch.equal(trainer.scheduler.betas, betas)
    trainer.close()
    for name in ("euler", "ddim", "dpm++"):
        pipe.scheduler = getattr(diffusers, kind).from_pretrained(tmp_path)
        set_scheduler(pipe, name)
        torch.testing.assert_close(pipe.scheduler.betas, betas)


def test_how_images_are_drawn_stays_the_classs_own() -> None:
    """PNDM left its spacing to its default; Euler's own is another."""
    pndm = helpers.tiny_pipeline().scheduler
    found = scheduler_like(pndm, diffusers.EulerDiscreteScheduler)
    assert found.config.timestep_spacing == "linspace"
    assert (found.config.beta_start, found.config.beta_schedule) == (0.00085, "scaled_linear")
    changed = scheduler_like(pndm, diffusers.DDPMScheduler, prediction_type="v_prediction")
    assert changed.config.prediction_type == "v_prediction"


def test_latents_are_clipped_only_where_the_model_says_so() -> None:
    """DDIM and DDPM clip x0 to [-1, 1] by default: for pixels."""
    schedule: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    solver = diffusers.DPMSolverMultistepScheduler(**schedule)
    sample, noise = torch.full((1, 1, 1, 2), 3.0), torch.full((1, 1, 1, 2), 0.1)
    for kind in (diffusers.DDIMScheduler, diffusers.DDPMScheduler):
        found = scheduler_like(solver, kind)
        assert found.config.clip_sample is False
        found.set_timesteps(10)
        image = found.step(noise, found.timesteps[-1], sample, generator=torch.Generator()).pred_original_sample
        assert float(image.min()) > 2.9
    assert scheduler_like(diffusers.DDIMScheduler(**schedule), diffusers.DDPMScheduler).config.clip_sample is False
    kept = scheduler_like(diffusers.DDIMScheduler(**schedule, clip_sample=True), diffusers.DDPMScheduler)
    assert kept.config.clip_sample is True


def test_a_tokenizer_without_a_limit_takes_the_text_encoders(tmp_path: Path) -> None:
    helpers.tiny_pipeline().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "tokenizer" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["model_max_length"]
    file.write_text(json.dumps(config))
    pipe = load_eager(tmp_path / "model")
    assert pipe.tokenizer.model_max_length == load_rest(tmp_path / "model").tokenizer.model_max_length == 77
    endless = bounded(pipe.tokenizer, 77)
    assert endless is pipe.tokenizer
    endless.model_max_length = int(1e30)
    assert token_limit(endless, 77) == 77
    assert encode_captions(TextParts.of(pipe), ["a star"])[STATES].shape == (1, 77, 32)
    assert endless.model_max_length == int(1e30)  # a user's own stays as it is


def test_captions_that_are_cut_are_counted_and_said_once() -> None:
    long = "x" * 76  # one token per letter, and the two at the ends
    tokenizer = helpers.tiny_tokenizer()
    assert too_long(tokenizer, ["x" * 75, long, "short", "é" * 40], 77) == [long, "é" * 40]
    pipe = helpers.tiny_pipeline()
    done = train(pipe, build_student(pipe.unet, "tiny"), latents([long, "short"]), CONFIG)
    assert done.history[0]["cut_captions"] == 1
    (note,) = done.notes
    assert note.startswith("1 caption has more than the 77 tokens that the text encoder reads, and was cut there")
    assert note.endswith(f"(one begins {long[:60]!r})")


class Fixed:
    """A session of fixed shapes, two rows at once."""

    contract = Contract("unet", (TensorSpec("x", "float32", (2, 3)), TensorSpec("t", "float32", ())), ())

    def run(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert feeds["x"].shape == (2, 3)
        return {"y": feeds["x"] * feeds["t"]}


def test_an_engine_of_fixed_shapes_takes_any_batch() -> None:
    for rows in (1, 2, 3, 4):
        x = torch.arange(rows * 3.0).reshape(rows, 3)
        found = run_split(Fixed(), {"x": x, "t": torch.tensor(2.0)})  # type: ignore[arg-type]
        torch.testing.assert_close(found["y"], 2 * x)


def test_an_image_of_odd_size_says_what_to_resize_it_to(tmp_path: Path) -> None:
    bundle = graph_bundle(tmp_path / "bundle", "fp32", ("unet", "vae_decoder"))
    contract = bundle.component("vae_decoder").contract
    checked: Any = SimpleNamespace(
        bundle=bundle, contract=contract, steps={}, profiles=Profiles(), scale=2, label="the engine"
    )
    with pytest.raises(RangeError, match=r"34x64 px .* height 34 is not a multiple of 4 pixels.*resize it, to 32x64"):
        check_sizes(checked, {"batch": 1, "height": 17, "width": 32})
