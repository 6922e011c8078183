"""`sdkd distill`, `sdkd finetune` and `sdkd lora` as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from training_runs import RUN, job, losses, pictures, same, sdkd, teacher, weights

from sdkd.core.text_files import prompts_of
from sdkd.core.torchrun import launch_command, without_flag
from sdkd.distill.training.config import make_config, read_recipe, recipe_names
from sdkd.distill.training.log import LOG, read_log
from sdkd.distill.training.run import run
from sdkd.errors import InputError, MissingExtraError, ModelError, OutputExistsError, TrainingError
from sdkd.models.diffusers_folder import write_pipeline
from sdkd.models.resolve import load_eager, provenance
from sdkd.students.blocks import build_student

SMALL = [f"--{name.replace('_', '-')}={value}" for name, value in RUN.items()]


def test_output_is_the_students_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    sdkd("distill", "--teacher", teacher(), "--data", pictures(), "--output", out, *SMALL, "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["student"], found["steps"], found["images"]) == ("sd-tiny", 2, 3)
    pipe = DiffusionPipeline.from_pretrained(out, local_files_only=True)
    assert pipe.unet.config.layers_per_block == 1
    assert pipe.unet.config.mid_block_type is None
    assert sum(parameter.numel() for parameter in pipe.unet.parameters()) == found["unet_parameters"]
    assert pipe("all red", num_inference_steps=2, output_type="np").images.shape == (1, 64, 64, 3)
    trained, taught = weights(out), weights(teacher())
    assert not torch.equal(trained["conv_in.weight"], taught["conv_in.weight"])
    assert len(trained) < len(taught)
    assert same(weights(pipe.vae), weights(load_eager(teacher()).vae))
    again = tmp_path / "again"  # distilling goes on from a student: the same images and noise, other weights
    sdkd("distill", "--teacher", teacher(), "--data", pictures(), "--output", again, "--init", out, *SMALL)
    assert losses(again)[0]["loss/feature"] != losses(out)[0]["loss/feature"]
    with pytest.raises(ModelError, match="is not the sd-small of this teacher"):
        run(job(tmp_path / "third", init=out, student="small"))


def test_card_log_and_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/sdkd", "distill", "--data", "my pictures"])
    out = tmp_path / "out"
    sdkd("distill", "--teacher", teacher(), "--data", pictures(), "--output", out, "--student", "bk-small", *SMALL)
    card = (out / "README.md").read_text()
    for words in (
        f"| teacher | `{teacher()}` |",
        "3 images at 64x64 pixels",
        "1 x task + 1 x output KD + 1 x feature KD (bk-sdm, 8 pairs)",
        "2 steps of 2 images, fp32",
        "sdkd distill --data 'my pictures'",
    ):
        assert words in card
    assert [row["step"] for row in read_log(out / LOG)] == [1, 2]
    about = provenance(out)
    assert (about["student"], about["steps"], about["random_weights"]) == ("bk-small", 2, False)
    assert about["settings"]["feature_weight"] == 1.0
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_finetuning_a_student_needs_no_teacher(tmp_path: Path) -> None:
    pipe = helpers.tiny_pipeline()
    before = build_student(pipe.unet, "small")
    write_pipeline(pipe, tmp_path / "student", unet=before)
    sdkd("finetune", "--model", tmp_path / "student", "--data", pictures(), "--output", tmp_path / "out", *SMALL)
    tuned = StableDiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True).unet
    assert tuned.state_dict().keys() == before.state_dict().keys()
    assert not torch.equal(tuned.conv_in.weight, before.conv_in.weight)
    assert [*losses(tmp_path / "out")[0]] == ["step", "loss/total", "loss/task"]


def test_lora_loads_into_its_model(tmp_path: Path) -> None:
    out = tmp_path / "out"
    sdkd("lora", "--model", teacher(), "--data", pictures(), "--output", out, *SMALL, "--lora-rank", 4)
    pipe = load_eager(teacher())
    before = pipe("all red", num_inference_steps=1, output_type="np", generator=torch.manual_seed(0)).images
    pipe.load_lora_weights(out)
    adapted = pipe("all red", num_inference_steps=1, output_type="np", generator=torch.manual_seed(0)).images
    assert abs(before - adapted).max() > 0
    assert "rank 4, alpha 4, targets attn" in (out / "README.md").read_text()


def test_what_cannot_be_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("")
    with pytest.raises(OutputExistsError, match="already exists"):
        run(job(tmp_path / "mine"))
    with pytest.raises(InputError, match="'no-data'"):
        run(job(tmp_path / "out", data="no-data"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        MissingExtraError, match=r"tracker 'wandb' needs the package 'wandb'.*pip install 'sdkd\[wandb\]'"
    ):
        run(job(tmp_path / "out", trackers=("wandb",)))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bad.png").write_bytes(b"\x89PNG")
    (tmp_path / "data" / "bad.txt").write_text("x")
    with pytest.raises(TrainingError, match=r"1 of 1 images .*bad\.png' cannot be read"):
        run(job(tmp_path / "out", data=tmp_path / "data"))
    assert {path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")} == {"data", "mine"}


def test_validation_images_are_drawn_by_steps_and_change_nothing(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, settings = tmp_path / "out", ["--accumulation", 2, "--ema", "0.5"]  # the reference counted forward passes
    words = ["--prompts", "all red;all blue", "--sample-every", 1, "--sample-steps", 2, "--trackers", "tensorboard"]
    sdkd("distill", "--teacher", teacher(), "--data", pictures(), "--output", out, *SMALL, *settings, *words)
    names = sorted(path.name for path in (out / "samples").iterdir())
    assert names == ["prompts.json", "step-000001.png", "step-000002.png"]
    assert json.loads((out / "samples" / "prompts.json").read_text())["prompts"] == ["all red", "all blue"]
    with Image.open(out / "samples" / "step-000002.png") as sheet:
        assert sheet.size == (128, 64)
    run(job(tmp_path / "plain", accumulation=2, ema=0.5))
    assert same(weights(out), weights(tmp_path / "plain"))
    (events,) = out.rglob("events.out.tfevents.*.0")
    found = EventAccumulator(str(events.parent))
    found.Reload()
    for name in ("loss/total", "loss/feature/up_blocks.0", "lr"):
        assert [(item.step, pytest.approx(item.value)) for item in found.Scalars(name)] == [
            (row["step"], row[name]) for row in read_log(out / LOG)
        ]


@pytest.mark.parametrize(
    ("name", "objective"), [("bk-v2-tiny", "distill"), ("lora", "lora"), ("portrait-finetune", "finetune")]
)
def test_a_recipe_of_every_kind_runs(name: str, objective: str, tmp_path: Path) -> None:
    _, settings = read_recipe(name, objective)
    small = RUN | {"batch_size": 1, "accumulation": 1, "resolution": 64, "save_every": 1}
    found = run(job(tmp_path / "out", **(settings | small | {"objective": objective})))
    assert found["steps"] == 2
    assert found["last"]["lr"] <= settings["learning_rate"]
    assert (tmp_path / "out" / "checkpoint-1").is_dir()


def test_recipes_say_what_was_published() -> None:
    students = ["bk-base", "bk-small", "bk-tiny", "bk-v2-base", "bk-v2-small", "bk-v2-tiny"]
    few = [
        "edgefusion",
        "koala-1b",
        "koala-700m",
        "lcm-lora",
        "lcm-lora-sdxl",
        "lcm-sd-small",
        "lcm-sd-tiny",
        "lcm-sdxl",
    ]
    last = ["lora", "portrait-finetune", "sd-small", "sd-tiny", "ssd-1b", "vega"]
    assert recipe_names() == [*students, *few, *last]
    small, tiny, base, lcm, fused = (
        make_config(*read_recipe(name, "distill"))
        for name in ("sd-small", "sd-tiny", "bk-base", "lcm-sd-tiny", "edgefusion")
    )
    assert (lcm.target_ema, lcm.guidance, lcm.solver_steps, lcm.caption_dropout) == (0.95, (5.0, 15.0), 50, 0.0)
    assert (fused.objective, fused.spec.name, fused.weights.feature) == ("consistency", "bk-tiny", 0.0)
    lora = make_config(*read_recipe("lcm-lora", "lora"))
    assert (lora.objective, lora.lora_rank, lora.lora_targets, lora.learning_rate) == (
        "consistency-lora",
        64,
        "all",
        1e-4,
    )
    assert (small.steps, small.learning_rate, small.weights) == (100_000, 1e-4, (1.0, 0.5, 0.5))
    assert (tiny.steps, tiny.spec.name) == (125_000, "sd-tiny")
    assert (base.steps, base.learning_rate, base.batch_size * base.accumulation) == (50_000, 5e-5, 256)
    assert (base.weights, base.pair_preset) == ((1.0, 1.0, 1.0), "bk-sdm")
    portrait = make_config(*read_recipe("portrait-finetune", "finetune"))
    assert (portrait.steps, portrait.batch_size, portrait.accumulation, portrait.resolution) == (131_000, 32, 4, 768)
    changed = make_config(*read_recipe("sd-tiny", "distill"), {"steps": 5, "learning_rate": None})
    assert (changed.steps, changed.learning_rate) == (5, 1e-4)


def test_recipes_and_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"recipe 'sd-huge' is unknown: choose one of bk-base, "):
        read_recipe("sd-huge", "distill")
    with pytest.raises(InputError, match="recipe 'lora' is for sdkd lora, not for sdkd distill"):
        read_recipe("lora", "distill")
    with pytest.raises(InputError, match="setting 'student' is unknown to finetune"):
        make_config("finetune", {"student": "tiny"})
    with pytest.raises(InputError, match="lora_dropout 2 is too large: give a number of at least 0 and below 1"):
        make_config("lora", {"lora_dropout": 2})


def test_prompts_come_from_a_file_or_a_text(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat; sitting\n\na dog\n")
    assert prompts_of(str(tmp_path / "prompts.txt")) == ("a cat; sitting", "a dog")
    assert prompts_of("a cat; a dog") == ("a cat", "a dog")
    with pytest.raises(InputError, match="hold no prompt"):
        prompts_of(" ; ")


def test_launching_passes_everything_on_but_the_number_of_processes() -> None:
    words = ["distill", "--num-processes", "2", "--data", "demo", "--num-processes=2", "--steps", "3"]
    assert without_flag(words) == ["distill", "--data", "demo", "--steps", "3"]
    command = launch_command(2, words)
    assert command[1:7] == ["-P", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert command[-7:] == ["-m", "sdkd.cli", "distill", "--data", "demo", "--steps", "3"]


def test_import_is_light() -> None:
    names = ["sdkd.distill.cli", "sdkd.commands.student", "sdkd.demo", "sdkd.students", "sdkd.toyworld.reader"]
    code = f"import sys, {', '.join(names)}; print([n for n in ('torch', 'diffusers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
