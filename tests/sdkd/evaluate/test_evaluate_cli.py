"""`sdkd evaluate` as a user runs it: what is measured, what is not and why, and the two files."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
from PIL import Image
from small_clip import save_small_clip

from sdkd.errors import InputError, ModelError, OutputExistsError, TrainingError
from sdkd.evaluate import cli
from sdkd.evaluate.evaluation import Settings, find_teacher
from sdkd.evaluate.metrics import RealImages
from sdkd.models.diffusers_folder import write_pipeline

SMALL: dict[str, Any] = {"steps": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("evaluate")
    teacher, student = folder / "teacher", folder / "student"
    write_pipeline(helpers.tiny_pipeline(), teacher)
    about = {"teacher": str(teacher), "student": "sd-tiny", "random_weights": False}
    write_pipeline(helpers.tiny_pipeline(student="tiny"), student, about=about)
    return str(teacher), str(student)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos")
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{index}.png")
        (path / f"{index}.txt").write_text(f"photo {index}")
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_clip(tmp_path_factory.mktemp("clip"))


def evaluated(output: Path, *names: str, **options: Any) -> dict[str, Any]:
    cli.evaluate(list(names), output=output, **(SMALL | options))
    found: dict[str, Any] = json.loads((output / "evaluation.json").read_text())
    return found


def test_all_that_can_be_measured(
    models: tuple[str, str], photos: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    out = tmp_path / "out"
    found = evaluated(out, models[1], data=str(photos), real=photos, clip=clip, images=3)
    teacher, student = found["models"]
    assert (teacher["role"], student["role"]) == ("teacher", "student")
    assert (teacher["model"], student["model"]) == models
    assert teacher["metrics"]["noise_prediction_mse"]["mean"] == 0.0
    assert teacher["metrics"]["psnr_to_teacher_db"]["identical"] is True
    noise = student["metrics"]["noise_prediction_mse"]
    assert noise["mean"] == pytest.approx(np.mean(noise["per_image"]))
    assert noise["mean"] > 0
    assert np.shape(noise["per_image"]) == (3, 10)
    psnr = student["metrics"]["psnr_to_teacher_db"]
    assert psnr["worst"] == min(psnr["per_image"])
    assert psnr["mean"] == pytest.approx(np.mean(psnr["per_image"]))
    assert len(student["metrics"]["clip_score"]["per_image"]) == 3
    assert student["metrics"]["cmmd"].keys() == {"cmmd", "biased", "model", "generated", "real"}
    assert "pip install torch-fidelity" in student["metrics"]["fid"]["not_measured"] or "--inception" in str(
        student["metrics"]["fid"]
    )
    assert "--data demo" in student["metrics"]["caption_accuracy"]["not_measured"]
    assert found["settings"]["prompts"] == ["photo 0", "photo 1", "photo 2"]
    assert found["settings"]["seeds"] == [0, 1, 2]
    page = (out / "evaluation.md").read_text()
    for words in ("| Model | Role | UNet (M) |", "identical", "FID: not measured: ", "| 900-999 |", "- seed: 0"):
        assert words in page


def test_nothing_but_a_model_measures_nothing_and_says_so(
    models: tuple[str, str],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = evaluated(tmp_path / "out", models[0], prompts="a;b")
    metrics = found["models"][0]["metrics"]
    assert {name: list(value) for name, value in metrics.items()} == {key: ["not_measured"] for key in metrics}
    assert "hf download openai/clip-vit-large-patch14`" in metrics["clip_score"]["not_measured"]
    assert metrics["psnr_to_teacher_db"]["not_measured"] == "no teacher is known; give it with --teacher"
    assert metrics["fid"]["not_measured"] == "it needs real images; give a folder of them with --real"
    words = " ".join(capsys.readouterr().out.split())
    assert "CLIP score: not measured: the weights of openai/clip-vit-large-patch14 are not on this disk" in words
    few = evaluated(tmp_path / "few", models[0], prompts="a", real=photos, steps=1)["models"][0]["metrics"]
    words = "1 generated and 3 real images are too few: at least 2 of each"
    assert [few[name]["not_measured"] for name in ("fid", "cmmd")] == [words, words]


def test_demo_reads_its_captions(models: tuple[str, str], tmp_path: Path) -> None:
    found = evaluated(tmp_path / "out", models[1], data="demo", images=2, json=True)
    captions = found["models"][1]["metrics"]["caption_accuracy"]
    assert captions["mean"] == pytest.approx((captions["seen"] + captions["held_out"]) / 2)
    assert captions["by_attribute"]["seen"].keys() == {"shape", "colour", "background", "size", "position"}
    assert len(captions["per_image"]) == found["settings"]["images"] == 4
    assert {row["run"]["guidance_scale"] for row in found["models"]} == {4.0}


def test_every_model_is_drawn_as_it_was_made_for(models: tuple[str, str], tmp_path: Path) -> None:
    few, about = tmp_path / "few", {"teacher": models[0], "student": "sd-tiny"}
    run = {"steps": 1, "guidance_scale": 1.0, "scheduler": "LCMScheduler"}
    write_pipeline(helpers.tiny_pipeline(student="tiny"), few, about=about | {"generation": run})
    found = evaluated(tmp_path / "out", models[0], str(few), prompts="a red star", steps=None, guidance=2.0)
    assert [row["run"] for row in found["models"]] == [
        {"steps": 25, "guidance_scale": 2.0, "scheduler": "PNDMScheduler"},
        run | {"guidance_scale": 2.0},
    ]
    assert found["schema"] == 2
    assert found["notes"][0].startswith("few: guidance 2 on a model that has its guidance built in")
    assert "| Model | Role | UNet (M) | Steps | Guidance |" in (tmp_path / "out" / "evaluation.md").read_text()


def test_teacher_is_found(models: tuple[str, str], tmp_path: Path) -> None:
    teacher, student = models
    assert find_teacher([student, teacher]) == teacher
    assert find_teacher([student]) == teacher
    assert find_teacher([teacher]) is None
    assert find_teacher([teacher], student) == student
    lost = tmp_path / "lost"
    write_pipeline(helpers.tiny_pipeline(), lost, about={"teacher": "gone/for-good", "student": "sd-tiny"})
    assert find_teacher([str(lost)]) is None


def test_what_is_given_is_checked_before_any_image(models: tuple[str, str], photos: Path, tmp_path: Path) -> None:
    def refused(message: str, error: type[Exception] = InputError, **options: Any) -> None:
        with pytest.raises(error, match=message):
            evaluated(tmp_path / "out", models[0], **options)

    refused(r"holds no config\.json", clip=photos)
    refused("holds no images", real=Path(models[0]))
    refused("'none.pth' does not exist", inception=Path("none.pth"))
    refused("'nothing' does not exist", ModelError, teacher="nothing")
    refused("steps 0 is too small: give a whole number from 1", steps=0)
    refused("images 0 is too small", images=0)
    with pytest.raises(InputError, match="guidance scale nan is"):
        Settings(guidance_scale=float("nan"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    refused("already exists", OutputExistsError)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_import_is_light() -> None:
    code = "import sys, sdkd.evaluate, sdkd.evaluate.cli; print({'torch', 'diffusers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_data_that_is_not_all_right(models: tuple[str, str], clip: Path, tmp_path: Path) -> None:
    """Other columns, one damaged image and one without a caption, in the data and in the real images."""
    data, rows = tmp_path / "data", []
    data.mkdir()
    for index in range(200):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / f"{index:03d}.png")
        rows.append({"path": f"{index:03d}.png", "alt": None if index == 1 else f"photo {index}"})
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (data / "000.png").write_bytes((data / "000.png").read_bytes()[:100])
    named = {"image_column": "path", "caption_columns": "title, alt"}
    found = evaluated(
        tmp_path / "out", models[0], data=str(data), real=data, clip=clip, images=2, steps=1, teacher=models[0], **named
    )
    assert found["settings"]["prompts"] == ["photo 0", "photo 2"]
    metrics = found["models"][0]["metrics"]
    assert (metrics["noise_prediction_mse"]["mean"], metrics["cmmd"]["real"]) == (0.0, 199)
    left_out, replaced = found["notes"][-2:]
    assert left_out.startswith("1 images could not be read and were left out: image ")
    assert replaced.startswith("2 images could not be read and were replaced: image ")
    with pytest.raises(InputError, match="no column file_name; its columns: path, alt"):
        evaluated(tmp_path / "other", models[0], data=str(data), prompts="a")
    with pytest.raises(InputError, match="no caption columns were given"):
        evaluated(tmp_path / "other", models[0], data=str(data), caption_columns=" ,")
    for index in range(3):
        (data / f"{index:03d}.png").write_bytes(b"no image")
    with pytest.raises(TrainingError, match=r"3 of 200 images \(1\.5%\) could not be read, more than 1% may not"):
        evaluated(tmp_path / "other", models[0], real=data, prompts="a")


def test_a_cache_is_data(models: tuple[str, str], photos: Path, tmp_path: Path) -> None:
    from sdkd.distill.cache_cli import CacheJob, run

    run(CacheJob(models[0], str(photos), str(tmp_path / "cache"), precision="fp32", workers=0))
    found = evaluated(tmp_path / "out", *models, data=str(tmp_path / "cache"), images=3)
    same = evaluated(tmp_path / "same", *models, data=str(photos), images=3)
    assert found["settings"]["prompts"] == ["photo 0", "photo 1", "photo 2"]
    noise = [report["models"][1]["metrics"]["noise_prediction_mse"]["mean"] for report in (found, same)]
    assert noise[0] == pytest.approx(noise[1], rel=1e-5)
    with pytest.raises(InputError, match=r"cache' is a cache of latents: give what it was made from"):
        run(CacheJob(models[0], str(tmp_path / "cache"), str(tmp_path / "again")))


def test_one_real_image_is_in_memory_at_a_time(tmp_path: Path) -> None:
    for index in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{index}.png")
    alive: list[weakref.ref[Image.Image]] = []
    for image in RealImages(tmp_path):
        alive.append(weakref.ref(image))
        del image
        assert sum(one() is not None for one in alive) <= 1
    assert len(alive) == 3
