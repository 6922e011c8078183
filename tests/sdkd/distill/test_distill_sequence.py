"""One folder through its life: trained, killed, gone on with, extended, exported, built, drawn from, and all again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engines import plug
from sdkd.cli import load_command
from sdkd.distill.training.checkpoint import checkpoints
from sdkd.distill.training.config import TrainConfig
from sdkd.distill.training.run import Job, run
from sdkd.models.diffusers_folder import write_pipeline
from sdkd.models.resolve import load_eager

SETTINGS: dict[str, Any] = {
    "batch_size": 2, "device": "cpu", "precision": "fp32", "log_every": 1, "schedule": "constant", "save_every": 1,
    "learning_rate": 1e-2,
}  # fmt: skip


def sdkd(*words: object) -> None:
    load_command(str(words[0])).main([str(word) for word in words[1:]], standalone_mode=False)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def exported(model: Path, bundle: Path) -> np.ndarray[Any, Any]:
    """What the model draws with its UNet on an engine, exported and built again."""
    parts = ("--components", "unet", "--components", "vae_decoder")
    sdkd("export", model, bundle, *parts, *(["--overwrite"] if bundle.exists() else []))
    sdkd("build-engine", bundle, "--target", "onnxruntime")
    return image_of(plug(load_eager(model), bundle, "onnxruntime", components=["unet"]))


def image_of(pipe: Any) -> np.ndarray[Any, Any]:
    image = pipe("all red", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    return np.asarray(image).astype(int)


def job(steps: int, resume: str = "auto") -> Job:
    return Job("teacher", "demo", Path("run"), TrainConfig(steps=steps, max_images=4, **SETTINGS), resume=resume)


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The name of a run's folder, beside its teacher in the working folder."""
    monkeypatch.chdir(tmp_path)
    write_pipeline(helpers.tiny_pipeline(), Path("teacher"))
    return Path("run")


def test_a_run_killed_before_its_first_checkpoint_starts_over(out: Path) -> None:
    def report(message: str, fraction: float | None) -> None:
        if message.startswith("step 1 of"):
            shutil.copytree(out, "killed")  # what a kill at this moment leaves

    run(job(2, "never"), report)
    whole = weights(out)
    shutil.rmtree(out)
    Path("killed").rename(out)
    assert checkpoints(out) == []
    run(job(2))
    assert same(weights(out), whole)
    assert [path.name for path in checkpoints(out)] == ["checkpoint-1", "checkpoint-2"]
    assert {path.name for path in Path().iterdir() if path.suffix != ".lock"} == {"teacher", "run"}


@pytest.mark.slow
def test_a_run_is_extended_and_its_engines_follow_under_the_same_names(out: Path) -> None:
    bundle = Path("bundle")
    images = []
    for steps in (2, 3):
        run(job(steps))
        images.append(exported(out, bundle))
        for model in (out, out / f"checkpoint-{steps}"):
            assert abs(images[-1] - image_of(load_eager(model))).max() <= 1
    assert abs(images[0] - images[1]).max() > 1
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2", "checkpoint-3"]
    assert {path.name for path in Path().iterdir() if path.suffix != ".lock"} == {"teacher", "run", "bundle"}
