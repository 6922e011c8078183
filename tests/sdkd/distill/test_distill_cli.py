"""`sdkd distill`, `sdkd finetune` and `sdkd lora` as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from sdkd.cli import load_command
from sdkd.core.torchrun import launch_command, without_flag
from sdkd.distill.training.config import TrainConfig, make_config, parse_prompts
from sdkd.distill.training.log import LOG
from sdkd.distill.training.recipes import read_recipe, recipe_names
from sdkd.distill.training.run import Job, run
from sdkd.errors import InputError, MissingExtraError, ModelError, OutputExistsError, TrainingError
from sdkd.models.diffusers_folder import write_pipeline
from sdkd.models.resolve import provenance
from sdkd.students.blocks import build_student

SMALL = ["--steps", "2", "--batch-size", "2", "--device", "cpu", "--precision", "fp32", "--log-every", "1"]
CONFIG: dict[str, Any] = {"steps": 2, "batch_size": 2, "device": "cpu", "precision": "fp32", "log_every": 1}


def sdkd(*words: object) -> None:
    load_command(str(words[0])).main([str(word) for word in words[1:]], standalone_mode=False)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distill") / "teacher"
    write_pipeline(helpers.tiny_pipeline(), path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    for name in ("red", "blue", "lime"):
        Image.new("RGB", (80, 64), name).save(path / f"{name}.png")
        (path / f"{name}.txt").write_text(f"all {name}")
    return path


def test_output_is_the_students_pipeline(
    teacher: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sdkd("distill", "--teacher", teacher, "--data", data, "--output", tmp_path / "out", *SMALL, "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["student"], found["steps"], found["images"]) == ("sd-tiny", 2, 3)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert pipe.unet.config.layers_per_block == 1
    assert pipe.unet.config.mid_block_type is None
    assert sum(parameter.numel() for parameter in pipe.unet.parameters()) == found["unet_parameters"]
    assert pipe("all red", num_inference_steps=2, output_type="np").images.shape == (1, 64, 64, 3)
    trained = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    taught = load_file(teacher / "unet" / "diffusion_pytorch_model.safetensors")
    assert not torch.equal(trained["conv_in.weight"], taught["conv_in.weight"])
    assert len(trained) < len(taught)
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert all(
        torch.equal(value, load_file(tmp_path / "out" / vae)[name]) for name, value in load_file(teacher / vae).items()
    )


def test_card_log_and_record(teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/sdkd", "distill", "--data", "my pictures"])
    out = tmp_path / "out"
    sdkd("distill", "--teacher", teacher, "--data", data, "--output", out, "--student", "bk-small", *SMALL)
    card = (out / "README.md").read_text()
    for words in (
        f"| teacher | `{teacher}` |",
        "3 images at 64x64 pixels",
        "1 x task + 1 x output KD + 1 x feature KD (bk-sdm, 8 pairs)",
        "2 steps of 2 images, fp32",
        "sdkd distill --data 'my pictures'",
    ):
        assert words in card
    assert [json.loads(row)["step"] for row in (out / LOG).read_text().splitlines()] == [1, 2]
    about = provenance(out)
    assert (about["student"], about["steps"], about["random_weights"]) == ("bk-small", 2, False)
    assert about["settings"]["feature_weight"] == 1.0
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_distilling_goes_on_from_a_student(teacher: Path, data: Path, tmp_path: Path) -> None:
    shared = ["--teacher", teacher, "--data", data, *SMALL]
    sdkd("distill", *shared, "--output", tmp_path / "first")
    sdkd("distill", *shared, "--output", tmp_path / "second", "--init", tmp_path / "first")
    first, second = (
        [json.loads(row)["loss/feature"] for row in (tmp_path / name / LOG).read_text().splitlines()]
        for name in ("first", "second")
    )
    assert second[0] != first[0]  # the same images and noise, other weights
    config = TrainConfig(**CONFIG, student="small")
    with pytest.raises(ModelError, match="is not the sd-small of this teacher"):
        run(Job(str(teacher), str(data), tmp_path / "third", config, init=str(tmp_path / "first")))


def test_finetuning_a_student_needs_no_teacher(teacher: Path, data: Path, tmp_path: Path) -> None:
    pipe = helpers.tiny_pipeline()
    write_pipeline(pipe, tmp_path / "student", unet=build_student(pipe.unet, "small"))
    sdkd("finetune", "--model", tmp_path / "student", "--data", data, "--output", tmp_path / "out", *SMALL)
    tuned = StableDiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True).unet
    before = build_student(pipe.unet, "small")
    assert tuned.state_dict().keys() == before.state_dict().keys()
    assert not torch.equal(tuned.conv_in.weight, before.conv_in.weight)
    rows = [json.loads(row) for row in (tmp_path / "out" / LOG).read_text().splitlines()]
    assert rows[0]["loss/total"] == rows[0]["loss/task"]
    assert not any(name.startswith(("loss/output", "loss/feature")) for name in rows[0])


def test_lora_loads_into_its_model(teacher: Path, data: Path, tmp_path: Path) -> None:
    sdkd("lora", "--model", teacher, "--data", data, "--output", tmp_path / "out", *SMALL, "--lora-rank", 4)
    pipe = StableDiffusionPipeline.from_pretrained(teacher, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "np", "generator": None}
    plain = pipe("all red", **(options | {"generator": torch.Generator().manual_seed(0)})).images
    pipe.load_lora_weights(tmp_path / "out")
    adapted = pipe("all red", **(options | {"generator": torch.Generator().manual_seed(0)})).images
    assert abs(plain - adapted).max() > 0
    assert "rank 4, alpha 4, targets attn" in (tmp_path / "out" / "README.md").read_text()


def test_output_is_checked_before_any_work(teacher: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(OutputExistsError, match="already exists"):
        run(Job(str(teacher), str(data), tmp_path, TrainConfig(**CONFIG)))
    with pytest.raises(InputError, match="'no-data'"):
        run(Job(str(teacher), "no-data", tmp_path / "out", TrainConfig(**CONFIG)))
    assert not (tmp_path / "out").exists()


def test_unreadable_images_leave_nothing(teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "bad.png").write_bytes(b"\x89PNG")
    (folder / "bad.txt").write_text("x")
    with pytest.raises(TrainingError, match=r"1 of 1 images .*bad\.png' cannot be read"):
        run(Job(str(teacher), str(folder), tmp_path / "out", TrainConfig(**CONFIG)))
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == ["data"]


def test_interrupted_training_leaves_nothing(teacher: Path, data: Path, tmp_path: Path) -> None:
    def report(message: str, fraction: float | None) -> None:
        if message.startswith("step 2"):
            raise KeyboardInterrupt("stop")

    with pytest.raises(KeyboardInterrupt, match="stop"):
        run(Job(str(teacher), str(data), tmp_path / "out", TrainConfig(**(CONFIG | {"steps": 5}))), report)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_validation_images_are_of_the_averaged_weights(teacher: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--prompts", "all red;all blue", "--sample-every", 1, "--sample-steps", 2, "--ema", "0.5"]
    sdkd("distill", "--teacher", teacher, "--data", data, "--output", out, *SMALL, *words)
    names = sorted(path.name for path in (out / "samples").iterdir())
    assert names == ["prompts.json", "step-000001.png", "step-000002.png"]
    assert json.loads((out / "samples" / "prompts.json").read_text())["prompts"] == ["all red", "all blue"]
    with Image.open(out / "samples" / "step-000002.png") as sheet:
        assert sheet.size == (128, 64)
    run(Job(str(teacher), str(data), tmp_path / "plain", TrainConfig(**CONFIG, ema=0.5)))
    file = "unet/diffusion_pytorch_model.safetensors"
    drawn, plain = load_file(out / file), load_file(tmp_path / "plain" / file)
    assert all(torch.equal(drawn[name], plain[name]) for name in drawn)  # drawing changes nothing


@pytest.mark.parametrize("name", ["bk-v2-tiny", "lora", "portrait-finetune", "sd-small"])
def test_a_recipe_of_every_kind_runs(name: str, teacher: Path, data: Path, tmp_path: Path) -> None:
    recipe = read_recipe(name)
    small = {"steps": 2, "batch_size": 1, "accumulation": 1, "resolution": 64, "device": "cpu", "save_every": 1}
    asked = recipe.config(**small, precision="fp32" if recipe.settings["precision"] == "fp16" else None)
    found = run(Job(str(teacher), str(data), tmp_path / "out", asked))
    assert found["steps"] == 2
    assert found["last"]["lr"] <= recipe.settings["learning_rate"]
    assert (tmp_path / "out" / "checkpoint-1").is_dir()


def test_recipes_say_what_was_published() -> None:
    assert all(read_recipe(name).source and read_recipe(name).config(device="cpu") for name in recipe_names())
    students = ["bk-base", "bk-small", "bk-tiny", "bk-v2-base", "bk-v2-small", "bk-v2-tiny"]
    assert recipe_names() == [*students, "lora", "portrait-finetune", "sd-small", "sd-tiny"]
    small, tiny, base = (read_recipe(name).config() for name in ("sd-small", "sd-tiny", "bk-base"))
    assert (small.steps, small.learning_rate, small.weights) == (100_000, 1e-4, (1.0, 0.5, 0.5))
    assert "README 1e-5" in read_recipe("sd-small").notes
    assert (tiny.steps, tiny.spec.name) == (125_000, "sd-tiny")
    assert (base.steps, base.learning_rate, base.batch_size * base.accumulation) == (50_000, 5e-5, 256)
    assert (base.weights, base.pair_preset) == ((1.0, 1.0, 1.0), "bk-sdm")
    portrait = read_recipe("portrait-finetune").config()
    assert (portrait.steps, portrait.batch_size, portrait.accumulation, portrait.resolution) == (131_000, 32, 4, 768)
    assert read_recipe("sd-tiny").config(steps=5, learning_rate=None).learning_rate == 1e-4


def test_recipes_and_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"recipe 'sd-huge' is unknown: choose one of bk-base, "):
        read_recipe("sd-huge")
    with pytest.raises(InputError, match="recipe 'lora' is for sdkd lora, not for sdkd distill"):
        read_recipe("lora", "distill")
    with pytest.raises(InputError, match="setting 'student' is unknown to finetune"):
        make_config("finetune", {"student": "tiny"})
    with pytest.raises(InputError, match="lora_dropout 2 is too large: give a number of at least 0 and below 1"):
        make_config("lora", {"lora_dropout": 2})


def test_prompts_come_from_a_file_or_a_text(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat; sitting\n\na dog\n")
    assert parse_prompts(str(tmp_path / "prompts.txt")) == ("a cat; sitting", "a dog")
    assert parse_prompts("a cat; a dog") == ("a cat", "a dog")
    with pytest.raises(InputError, match="hold no prompt"):
        parse_prompts(" ; ")


def test_a_missing_tracker_is_named_before_any_work(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        MissingExtraError, match=r"tracker 'wandb' needs the package 'wandb'.*pip install 'sdkd\[wandb\]'"
    ):
        run(Job(str(teacher), str(data), tmp_path / "out", TrainConfig(**CONFIG, trackers=("wandb",))))
    assert not (tmp_path / "out").exists()


def test_launching_passes_everything_on_but_the_number_of_processes() -> None:
    words = ["distill", "--num-processes", "2", "--data", "demo", "--num-processes=2", "--steps", "3"]
    assert without_flag(words) == ["distill", "--data", "demo", "--steps", "3"]
    command = launch_command(2, words)
    assert command[1:7] == ["-P", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert command[-7:] == ["-m", "sdkd.cli", "distill", "--data", "demo", "--steps", "3"]


def test_import_is_light() -> None:
    code = (
        "import sys, sdkd.distill.cli, sdkd.commands.student; "
        "print([n for n in ('torch', 'diffusers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tensorboard_gets_every_record(teacher: Path, data: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(Job(str(teacher), str(data), tmp_path / "out", TrainConfig(**CONFIG, trackers=("tensorboard",))))
    (events,) = (tmp_path / "out").rglob("events.out.tfevents.*.0")
    found = EventAccumulator(str(events.parent))
    found.Reload()
    rows = [json.loads(row) for row in (tmp_path / "out" / LOG).read_text().splitlines()]
    for name in ("loss/total", "loss/feature/up_blocks.0", "lr"):
        assert [(item.step, pytest.approx(item.value)) for item in found.Scalars(name)] == [
            (row["step"], row[name]) for row in rows
        ]


def test_training_from_a_cache(teacher: Path, data: Path, tmp_path: Path) -> None:
    sdkd("cache", teacher, data, tmp_path / "cache", "--precision", "fp32")
    shared = ["--teacher", teacher, "--data", tmp_path / "cache", *SMALL]
    sdkd("distill", *shared, "--output", tmp_path / "cached")
    sdkd("distill", "--teacher", teacher, "--data", data, *SMALL, "--output", tmp_path / "images")
    first, second = (
        [json.loads(row)["loss/total"] for row in (tmp_path / name / LOG).read_text().splitlines()]
        for name in ("cached", "images")
    )
    assert first == second
    other = Job(str(teacher), str(tmp_path / "cache"), tmp_path / "other", TrainConfig(**CONFIG, resolution=128))
    with pytest.raises(InputError, match="resolution 128 is not the cache's 64"):
        run(other)
