"""What tests of training share: a small teacher and its data, runs of few steps, and what is read back of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import torch
from diffusers import AutoencoderTiny
from made_once import made_once
from PIL import Image
from safetensors.torch import load_file

from sdkd.cli import load_command
from sdkd.distill import TrainConfig, TrainResult, train
from sdkd.distill.data.latents import LatentCache
from sdkd.distill.training.log import LOG, read_log
from sdkd.distill.training.run import Job
from sdkd.distill.training.trainer import Trainer
from sdkd.models.diffusers_folder import write_pipeline
from sdkd.students.blocks import build_student

SMALL_VAE: dict[str, Any] = {
    "encoder_block_out_channels": (4,) * 4, "decoder_block_out_channels": (4,) * 4,
    "num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4,
}  # fmt: skip
RUN: dict[str, Any] = {"steps": 2, "batch_size": 2, "device": "cpu", "precision": "fp32", "log_every": 1}


def sdkd(*words: object) -> None:
    """The command line, in this process."""
    load_command(str(words[0])).main([str(word) for word in words[1:]], standalone_mode=False)


def teacher() -> Path:
    """The tiny pipeline's folder: not to be changed."""
    return made_once("tiny-teacher", lambda folder: write_pipeline(helpers.tiny_pipeline(), folder))


def small_vae() -> Path:
    """A VAE of TAESD's shape that fits the tiny pipeline: not to be changed."""
    vae = AutoencoderTiny(**SMALL_VAE)
    return made_once("small-vae", lambda folder: helpers.fixed_weights(vae, 3).save_pretrained(folder))


def pictures() -> Path:
    """A folder of three captioned images: not to be changed."""

    def draw(folder: Path) -> None:
        folder.mkdir()
        for name in ("red", "blue", "lime"):
            Image.new("RGB", (80, 64), name).save(folder / f"{name}.png")
            (folder / f"{name}.txt").write_text(f"all {name}")

    return made_once("pictures", draw)


def latents(count: int = 7) -> LatentCache:
    mean = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return LatentCache(mean, torch.full_like(mean, 0.1), [f"number {index}" for index in range(count)])


def trainer(pipe: Any = None, data: Any = None, **settings: Any) -> Trainer:
    """The trainer of a student (tiny, unless another is asked for) on latents, or on other data."""
    config, pipe = TrainConfig(**(RUN | settings)), pipe or helpers.tiny_pipeline()
    return Trainer(pipe, build_student(pipe.unet, config.student), latents() if data is None else data, config)


def trained(data: Any, pipe: Any = None, folder: Path | None = None, **settings: Any) -> TrainResult:
    """A run of a student (tiny, unless another is asked for)."""
    config, pipe = TrainConfig(**(RUN | settings)), pipe or helpers.tiny_pipeline()
    return train(pipe, build_student(pipe.unet, config.student), data, config, folder=folder)


def job(
    output: Path, *, model: object = None, data: object = None, resume: object = "never", init: object = None,
    overwrite: bool = False, teacher_of_lora: object = None, **settings: Any,
) -> Job:  # fmt: skip
    """What a command would run, on the tiny teacher and the pictures unless others are given."""
    return Job(
        str(model or teacher()), str(data or pictures()), output, TrainConfig(**(RUN | settings)), str(resume),
        overwrite=overwrite, init=str(init) if init else None,
        teacher=str(teacher_of_lora) if teacher_of_lora else None,
    )  # fmt: skip


def weights(of: Path | torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of a module, or of the UNet of a pipeline's folder."""
    if isinstance(of, Path):
        return load_file(of / "unet" / "diffusion_pytorch_model.safetensors")
    return {name: value.clone() for name, value in of.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses(folder: Path) -> list[dict[str, float]]:
    """The log of a run, without what depends on time."""
    return [{key: row[key] for key in row if key.startswith("loss") or key == "step"} for row in read_log(folder / LOG)]


def unet_output(unet: torch.nn.Module) -> torch.Tensor:
    """What a tiny UNet gives for fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    with torch.no_grad():
        found: torch.Tensor = unet(sample, torch.tensor([10, 700]), encoder_hidden_states=text).sample
    return found


def fused(pipe: Any, lora: Path | dict[str, torch.Tensor]) -> torch.nn.Module:
    """The pipeline's UNet with a LoRA, as diffusers loads it, in its weights."""
    pipe.load_lora_weights(lora)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    unet: torch.nn.Module = pipe.unet
    return unet
