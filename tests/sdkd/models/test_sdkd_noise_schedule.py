"""Libraries' defaults that are not this model's: noise schedules left out of a config, tokenizers without a limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import helpers
import pytest
import torch

from sdkd.distill.data.encode import encode_captions, too_long
from sdkd.distill.data.latents import LatentCache
from sdkd.distill.training.config import TrainConfig
from sdkd.distill.training.loop import train
from sdkd.distill.training.trainer import Trainer
from sdkd.errors import ModelError
from sdkd.models.clip_tokenizer import bounded, token_limit
from sdkd.models.resolve import load_eager, load_rest
from sdkd.models.schedulers import SCHEDULERS, scheduler_like, set_scheduler
from sdkd.students.blocks import build_student

CONFIG = TrainConfig(steps=1, batch_size=2, precision="fp32", device="cpu", log_every=1, caption_dropout=0.0)


def latents(captions: list[str]) -> LatentCache:
    mean = torch.randn(len(captions), 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return LatentCache(mean, torch.full_like(mean, 0.1), captions)


def saved_without(kind: str, folder: Path) -> Any:
    """A scheduler from a config that leaves its class's defaults out, as some published models do."""
    folder.mkdir(exist_ok=True)
    (folder / "scheduler_config.json").write_text(json.dumps({"_class_name": kind}))
    return getattr(diffusers, kind).from_pretrained(folder)


@pytest.mark.parametrize("kind", ["LCMScheduler", "TCDScheduler", "DDIMScheduler"])
def test_defaults_of_the_published_class_stay(kind: str, tmp_path: Path) -> None:
    pipe = helpers.tiny_pipeline()
    pipe.scheduler = saved_without(kind, tmp_path)
    betas = pipe.scheduler.betas.clone()
    trainer = Trainer(pipe, build_student(pipe.unet, "tiny"), latents(["a", "b"]), CONFIG)
    assert torch.equal(trainer.scheduler.betas, betas)
    trainer.close()
    for name in ("euler", "ddim", "dpm++"):
        if name in SCHEDULERS:
            pipe.scheduler = saved_without(kind, tmp_path)
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


def test_a_schedule_without_betas_is_refused() -> None:
    pipe = helpers.tiny_pipeline()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ModelError, match="the scheduler FlowMatchEulerDiscreteScheduler has no noise schedule"):
        Trainer(pipe, build_student(pipe.unet, "tiny"), latents(["a", "b"]), CONFIG)


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
    assert encode_captions(endless, pipe.text_encoder, ["a star"]).shape == (1, 77, 32)
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
