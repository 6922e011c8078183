"""A small VAE learns from a full one: losses by value, both halves, the same from a cache, resumed bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
import training_runs
from diffusers import AutoencoderTiny
from safetensors.torch import load_file
from training_runs import pictures, sdkd, teacher

from sdkd.core.perceptual import NotMeasuredError
from sdkd.distill.data.encode import encode_image
from sdkd.distill.training.record import checkpoints
from sdkd.distill.vae.config import vae_config
from sdkd.distill.vae.loop import train_vae
from sdkd.distill.vae.losses import LOSSES, parse_losses
from sdkd.distill.vae.trainer import decode, new_vae
from sdkd.errors import InputError, TrainingError

SMALL: dict[str, Any] = {"width": 8, "blocks": 1, "batch_size": 2, "device": "cpu", "log_every": 1}
WORDS = ("--width", 4, "--blocks", 1, "--batch-size", 1, "--device", "cpu", "--log-every", 1, "--workers", 0)
UNET = {"sample_size": 8, **helpers.TEACHER_UNET}


def run(output: Path, *words: object, data: Path | None = None) -> None:
    """The command on the tiny teacher and three pictures."""
    sdkd("vae-distill", "--vae-of", teacher(), "--data", data or pictures(), "--output", output, *WORDS, *words)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_losses_have_the_values_of_their_definitions() -> None:
    wanted = torch.zeros(1, 3, 8, 8)
    made = torch.full_like(wanted, 0.5)
    made[..., 4:] = -0.5  # one edge across, and a mean of 0
    found = {name: float(loss(made, wanted)) for name, loss in LOSSES.items() if loss is not None}
    assert found == pytest.approx({"l1": 0.5, "mse": 0.25, "coarse": 0.5, "edges": 1 / 7})
    made[..., ::2], made[..., 1::2] = 1.0, -1.0
    assert float(LOSSES["coarse"](made, wanted)) == 0  # type: ignore[misc]
    assert parse_losses("mse=0.5, edges=0,lpips=0.1") == {"mse": 0.5, "lpips": 0.1}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"losses": "l2=1"}, "loss 'l2' is unknown: choose from l1, mse, coarse, edges, lpips"),
        ({"losses": "l1"}, "loss 'l1' has no number for a weight: give e.g. l1=1"),
        ({"losses": "l1=-1"}, "weight of the loss 'l1' -1.0 is too small"),
        ({"losses": "l1=0"}, "leave nothing to learn"),
        ({"width": 0}, "width 0 is too small"),
        ({"blocks": "3;3"}, "blocks '3;3' are no whole numbers"),
        ({"blocks": "3,0"}, "blocks 0 is too small"),
        ({"precision": "fp16"}, "precision 'fp16' overflows in Stable Diffusion's VAE: give bf16 or fp32"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        vae_config(**settings)


def test_a_small_vae_encodes_without_a_deviation() -> None:
    vae, pixels = AutoencoderTiny.from_pretrained(training_runs.small_vae()), torch.rand(3, 64, 64) * 2 - 1
    mean, std = encode_image(vae, pixels)
    assert torch.equal(mean, vae.encode(pixels[None]).latents[0])
    assert (std.shape, float(std.abs().max())) == (mean.shape, 0.0)


def test_both_halves_learn_and_what_is_wrong_stops_the_run() -> None:
    full, data = helpers.tiny_vae(), training_runs.latents(4)
    before = {name: value.clone() for name, value in full.state_dict().items()}
    config = vae_config(steps=40, learning_rate=5e-3, losses="l1=1,mse=1", **SMALL)
    done = train_vae(full, data, config, UNET)
    first, last = done.history[0], done.history[-1]
    assert last["loss/l1"] < 0.6 * first["loss/l1"]
    assert last["loss/latents"] < 0.9 * first["loss/latents"]
    assert first["loss/total"] == pytest.approx(sum(first[f"loss/{name}"] for name in ("l1", "mse", "latents")))
    assert all(torch.equal(value, before[name]) for name, value in full.state_dict().items())
    wanted, untrained = decode(full, data.mean), decode(new_vae(full, config), data.mean)
    error = (decode(done.vae, data.mean) - wanted).abs().mean()
    assert error < 0.6 * (untrained - wanted).abs().mean()
    assert (done.vae.config.scaling_factor, done.vae.config.decoder_block_out_channels) == (1.0, (8, 8, 8, 8))
    with pytest.raises(TrainingError, match=r"at step \d+, of image .*: training was stopped; start .*--learning-rate"):
        train_vae(full, data, vae_config(steps=9, learning_rate=1000.0, **SMALL | {"batch_size": 1}), UNET)
    with pytest.raises(InputError, match="blocks 2, 1 are 2 numbers, and this VAE doubles the image 3 times"):
        new_vae(full, vae_config(blocks="2,1"))
    with pytest.raises(NotMeasuredError, match=r"LPIPS needs|weights of AlexNet are not"):
        train_vae(full, data, vae_config(steps=1, losses="lpips=1", **SMALL), UNET)


def test_a_run_goes_on_bit_for_bit_and_a_cache_teaches_what_its_images_do(tmp_path: Path, capsys: Any) -> None:
    run(tmp_path / "whole", "--steps", 4, "--json")
    summary = json.loads(capsys.readouterr().out)
    assert (summary["steps"], summary["teacher_scaling_factor"]) == (4, helpers.VAE["scaling_factor"])
    assert AutoencoderTiny.from_pretrained(tmp_path / "whole").num_parameters() == summary["parameters"]
    assert f"{summary['psnr_db']:.1f} dB" in (tmp_path / "whole" / "README.md").read_text()

    run(tmp_path / "parts", "--steps", 2, "--schedule", "constant", "--save-every", 1)
    run(tmp_path / "parts", "--steps", 4, "--schedule", "constant", "--resume", "auto")
    run(tmp_path / "cached", "--steps", 4, "--schedule", "constant", data=cache(tmp_path / "cache"))
    parts, cached = weights(tmp_path / "parts"), weights(tmp_path / "cached")
    assert all(torch.equal(value, cached[name]) for name, value in parts.items())
    assert len((tmp_path / "parts" / "training.jsonl").read_text().splitlines()) == 4
    with pytest.raises(SystemExit, match="1"):
        run(tmp_path / "parts", "--steps", 5, "--schedule", "constant", "--resume", "auto", "--seed", 1)
    assert "is of a run with another seed: give the same again" in capsys.readouterr().err
    record = tmp_path / "parts" / "checkpoint-4" / "checkpoint.json"
    record.write_text(record.read_text().replace('"step": 4', '"step": 3'))
    with pytest.raises(SystemExit, match="1"):
        run(tmp_path / "parts", "--steps", 5, "--schedule", "constant", "--resume", "auto")
    assert "checkpoint-4' was changed in checkpoint.json: delete it, and go on from" in capsys.readouterr().err
    run(tmp_path / "parts", "--steps", 3, "--schedule", "constant", "--resume", tmp_path / "parts" / "checkpoint-2")
    assert [path.name for path in checkpoints(tmp_path / "parts")] == ["checkpoint-2", "checkpoint-3"]
    with pytest.raises(SystemExit, match="1"):
        sdkd("vae-distill", "--vae-of", "demo", "--data", tmp_path / "cache", "--output", tmp_path / "no", *WORDS)
    assert "was made by another model (differs: vae, scaling_factor)" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def cache(folder: Path) -> Path:
    sdkd("cache", teacher(), pictures(), folder, "--precision", "fp32", "--device", "cpu", "--no-text")
    return folder
