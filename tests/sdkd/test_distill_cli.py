"""`sdkd distill` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from sdkd.distill import cli
from sdkd.errors import InputError, OutputExistsError
from sdkd.models import provenance, save_pipeline

SMALL: dict[str, Any] = {"steps": 2, "batch_size": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distill") / "teacher"
    save_pipeline(helpers.tiny_pipeline(), path)
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
    cli.distill(str(teacher), str(data), tmp_path / "out", "tiny", json=True, **SMALL)
    found = json.loads(capsys.readouterr().out)
    assert (found["student"], found["steps"]) == ("sd-tiny", 2)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert pipe.unet.config.layers_per_block == 1
    assert pipe.unet.config.mid_block_type is None
    assert sum(parameter.numel() for parameter in pipe.unet.parameters()) == found["student_parameters"]
    assert pipe("all red", num_inference_steps=2, output_type="np").images.shape == (1, 64, 64, 3)
    trained = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    taught = load_file(teacher / "unet" / "diffusion_pytorch_model.safetensors")
    assert not torch.equal(trained["conv_in.weight"], taught["conv_in.weight"])
    assert len(trained) < len(taught)


def test_card_log_and_record(teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/sdkd", "distill", "--data", "my pictures"])
    cli.distill(str(teacher), str(data), tmp_path / "out", "bk-small", log_every=1, **SMALL)
    card = (tmp_path / "out" / "README.md").read_text()
    for words in (
        f"| teacher | `{teacher}` |",
        "3 images at 64x64 pixels",
        "1 x task + 1 x output KD + 1 x feature KD (bk-sdm, 8 pairs)",
        "2 steps of 2 images",
        "sdkd distill --data 'my pictures'",
    ):
        assert words in card
    rows = (tmp_path / "out" / cli.LOG).read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]
    about = provenance(tmp_path / "out")
    assert (about["student"], about["steps"], about["random_weights"]) == ("bk-small", 2, False)
    assert about["settings"]["feature_weight"] == 1.0


def test_output_is_checked_before_any_work(teacher: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(OutputExistsError, match="already exists"):
        cli.distill(str(teacher), str(data), tmp_path, "tiny", **SMALL)
    with pytest.raises(InputError, match="'no-data' is no folder"):
        cli.distill(str(teacher), "no-data", tmp_path / "out", "tiny", **SMALL)
    assert not (tmp_path / "out").exists()


def test_unreadable_image_leaves_nothing(teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "bad.png").write_bytes(b"\x89PNG")
    (folder / "bad.txt").write_text("x")
    with pytest.raises(InputError, match=r"bad.png' cannot be read"):
        cli.distill(str(teacher), str(folder), tmp_path / "out", "tiny", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_interrupted_training_leaves_nothing(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def report(message: str, fraction: float | None) -> None:
        if message.startswith("step 2"):
            raise KeyboardInterrupt("stop")

    config = cli.DistillConfig(steps=5, batch_size=2, log_every=1, device="cpu")
    with pytest.raises(KeyboardInterrupt, match="stop"):
        cli.run(str(teacher), str(data), tmp_path / "out", config, report=report)
    assert list(tmp_path.iterdir()) == []


def test_import_is_light() -> None:
    code = (
        "import sys, sdkd.distill.cli, sdkd.student_cli; print([n for n in ('torch', 'diffusers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
