"""Ends of runs and new beginnings: continued, refused by name, started again from a checkpoint, used as a model."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
import training_runs
from PIL import Image
from safetensors.torch import load_file
from training_runs import losses, pictures, same, sdkd, teacher, weights

from engines import plug
from sdkd.distill.training.log import LOG, read_log
from sdkd.distill.training.record import checkpoints
from sdkd.distill.training.run import Job, run
from sdkd.errors import InputError, ModelError
from sdkd.models.diffusers_folder import write_pipeline
from sdkd.models.resolve import load_component, load_eager, resolve
from sdkd.students.lora_file import read_lora


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, and a finished run of two steps in `run`."""
    folder = tmp_path_factory.mktemp("go_on")
    shutil.copytree(teacher(), folder / "teacher")
    run(job(folder, folder / "run", ema=0.5))
    return folder


def job(work: Path, output: Path, **settings: Any) -> Job:
    return training_runs.job(output, **({"model": work / "teacher", "schedule": "constant"} | settings))


def test_a_finished_run_goes_on_bit_for_bit(work: Path, tmp_path: Path) -> None:
    run(job(work, tmp_path / "whole", steps=4, ema=0.5))
    out = tmp_path / "run"
    shutil.copytree(work / "run", out)
    before = weights(out)

    def report(message: str, fraction: float | None) -> None:
        if message.startswith("step 4 of"):
            assert same(weights(out), before)  # the finished pipeline is there until the new one is

    done = run(job(work, out, steps=4, ema=0.5, resume="auto"), report)
    assert (done["steps"], done["remarks"]) == (4, [])
    assert same(weights(out), weights(tmp_path / "whole"))
    assert not same(weights(out), before)
    assert losses(out) == losses(tmp_path / "whole")
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2", "checkpoint-4"]


def test_a_finished_run_says_so_and_stays(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(work / "run", out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    done = run(job(work, out, ema=0.5, resume="auto"))
    assert done["remarks"] == ["this run of 2 steps was finished before: ask for more --steps to go on"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(InputError, match=r"other settings \(learning_rate 0.0001 -> 0.001\)"):
        run(job(work, out, ema=0.5, resume="auto", learning_rate=1e-3))
    with pytest.raises(InputError, match="is at step 2, beyond --steps 1"):
        run(job(work, out, ema=0.5, resume="auto", steps=1))


def test_a_run_killed_at_its_very_end_is_finished(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(work / "run", out)
    for name in ("model_index.json", "sdkd.json"):
        (out / name).unlink()
    shutil.rmtree(out / "unet")
    run(job(work, out, ema=0.5, resume="auto"))
    assert same(weights(out), weights(work / "run"))
    assert resolve(out).kind == "folder"


def test_a_schedule_that_ends_says_what_differs(work: Path, tmp_path: Path) -> None:
    run(job(work, tmp_path / "run", schedule="cosine"))
    done = run(job(work, tmp_path / "run", schedule="cosine", steps=4, resume="auto"))
    (remark,) = done["remarks"]
    assert remark.startswith("the cosine schedule was laid out for 2 steps up to step 2, and for 4 from there")
    rates = [row["lr"] for row in read_log(tmp_path / "run" / LOG)]
    assert rates == pytest.approx([1e-4, 0.5e-4, 0.5e-4, (1 - 0.5**0.5) / 2 * 1e-4])


@pytest.mark.parametrize("changed", ["data", "teacher"])
def test_other_data_or_another_teacher_is_refused_and_the_way_on_works(
    changed: str, work: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(work / "run", out)
    if changed == "teacher":
        write_pipeline(helpers.tiny_pipeline(7), tmp_path / "teacher")
    shutil.copytree(pictures(), tmp_path / "data")
    Image.new("RGB", (80, 64), "white").save(tmp_path / "data" / "lime.png")  # as many, with the same captions
    other = {"data": tmp_path / "data"} if changed == "data" else {"model": tmp_path / "teacher"}
    for steps in (2, 4):
        with pytest.raises(InputError, match=f"was trained with (other|another) {changed}: give") as found:
            run(job(work, out, steps=steps, ema=0.5, resume="auto", **other))
    if changed == "teacher":
        return
    words = shlex.split(str(found.value).partition("another folder: ")[2])
    assert words[::2] == ["--init", "--output"]
    run(job(work, Path(words[3]), init=words[1], **other))
    assert (Path(words[3]) / "model_index.json").is_file()


def test_a_new_run_starts_from_the_weights_of_a_checkpoint(work: Path, tmp_path: Path) -> None:
    started = {
        objective: run(job(work, tmp_path / objective, init=work / "run" / "checkpoint-2", **settings))
        for objective, settings in {
            "distill": {"learning_rate": 1e-9},
            "finetune": {"learning_rate": 1e-9, "objective": "finetune", "model": work / "run"},
        }.items()
    }
    averaged = load_file(work / "run" / "checkpoint-2" / "unet_ema" / "diffusion_pytorch_model.safetensors")
    for objective, done in started.items():
        assert done["steps"] == 2
        for name, value in weights(tmp_path / objective).items():
            torch.testing.assert_close(value, averaged[name], rtol=0, atol=1e-6)


def test_a_lora_starts_from_a_checkpoint_of_one(work: Path, tmp_path: Path) -> None:
    lora: dict[str, Any] = {"objective": "lora", "lora_rank": 2, "lora_alpha": 4.0, "learning_rate": 1e-9}
    run(job(work, tmp_path / "one", **(lora | {"learning_rate": 1e-2})))
    run(job(work, tmp_path / "two", init=tmp_path / "one" / "checkpoint-2", **lora))
    one, two = (read_lora(tmp_path / name)[0] for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="has r 2 and lora_alpha 4: give --lora-rank and --lora-alpha to match"):
        run(job(work, tmp_path / "three", init=tmp_path / "one", objective="lora"))
    with pytest.raises(InputError, match="is not of the layers and rank that are to be trained"):
        run(job(work, tmp_path / "three", init=tmp_path / "one", **(lora | {"lora_targets": "all"})))
    with pytest.raises(ModelError, match=r"holds a LoRA, not a model: load .*load_lora_weights .*checkpoint-2/lora'$"):
        resolve(tmp_path / "one" / "checkpoint-2")


def test_a_checkpoint_is_a_model(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its UNet is the averaged one, as the finished pipeline's is; the rest is its teacher's."""
    monkeypatch.chdir(work)
    shutil.copytree("run/checkpoint-2", tmp_path / "checkpoint-2")  # it knows its teacher from anywhere
    place = tmp_path / "checkpoint-2"
    pipe, finished = load_eager(place), load_eager("run")
    assert same(pipe.unet.state_dict(), finished.unet.state_dict())
    assert same(pipe.vae.state_dict(), finished.vae.state_dict())
    assert same(load_component(place, "unet").state_dict(), finished.unet.state_dict())
    assert resolve(place).unet_config["layers_per_block"] == 1
    assert resolve(place).digests.keys() == resolve("run").digests.keys()
    assert resolve(place).digests["vae_decoder"] == resolve("teacher").digests["vae_decoder"]
    pipe.set_progress_bar_config(disable=True)
    assert pipe("all red", num_inference_steps=1, output_type="np").images.shape == (1, 64, 64, 3)
    sdkd("generate", place, "all red", "--steps", 1, "--output", tmp_path / "image.png")
    assert (tmp_path / "image.png").is_file()
    (work / "teacher").rename(work / "gone")
    try:
        with pytest.raises(ModelError, match=r"checkpoint .* needs the model that it was trained on"):
            resolve(place)
    finally:
        (work / "gone").rename(work / "teacher")


def image_of(pipe: Any) -> np.ndarray[Any, Any]:
    image = pipe("all red", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    return np.asarray(image).astype(int)


@pytest.mark.slow
def test_a_run_is_extended_and_its_engines_follow_under_the_same_names(work: Path, tmp_path: Path) -> None:
    out, bundle = tmp_path / "run", tmp_path / "bundle"
    parts = ("--components", "unet", "--components", "vae_decoder")
    images = []
    for steps in (2, 3):
        run(job(work, out, steps=steps, save_every=1, learning_rate=1e-2, resume="auto"))
        sdkd("export", out, bundle, *parts, *(["--overwrite"] if bundle.exists() else []))
        sdkd("build-engine", bundle, "--target", "onnxruntime")
        images.append(image_of(plug(load_eager(out), bundle, "onnxruntime", components=["unet"])))
        for model in (out, out / f"checkpoint-{steps}"):
            assert abs(images[-1] - image_of(load_eager(model))).max() <= 1
    assert abs(images[0] - images[1]).max() > 1
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2", "checkpoint-3"]
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"} == {"run", "bundle"}
