"""Every command that writes leaves alone what it reads and what sdkd did not write, and says so before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from engines.generate.drawing import encode_png
from engines.generate.prompts import write_metadata
from sdkd.cli import app
from sdkd.core.marks import is_drawn_image, is_written_lora
from sdkd.demo import teacher_path
from sdkd.demo.run import check_outputs
from sdkd.distill.training.plot import write_page
from sdkd.errors import OutputExistsError
from sdkd.students.lora_file import write_lora

SETTINGS = ["prompt", "negative_prompt", "seed", "steps", "guidance_scale", "size", "scheduler", "model", "target"]

# Command -> its words; {m} is a model folder, {p} a folder of somebody else's.
READS = {
    "export": "{m} {m} --overwrite",
    "build-engine": "{m} --target onnxruntime --output {m} --overwrite",
    "student": "{m} {m} --student tiny --overwrite",
    "cache": "{m} demo {m} --overwrite",
    "distill": "--teacher {m} --data demo --steps 1 --overwrite --output {m}/unet",
    "finetune": "--model {m} --data demo --steps 1 --overwrite --output {m}",
    "lora": "--model {m} --data demo --steps 1 --overwrite --output {m}/..",
    "evaluate": "demo --teacher {m} --output {m} --overwrite",
    "compare": "{m} --output {m} --overwrite",
    "remap-lora": "{m}/unet {m}/unet/config.safetensors --student tiny --overwrite",
    "convert": "{m} {m}/unet/config.safetensors --overwrite",
    "generate": "{m} --prompts {p}/prompts.txt --output {m} --overwrite",
}
FOREIGN = {
    "export": "demo {p} --overwrite",
    "build-engine": "demo --target onnxruntime --output {p} --overwrite",
    "student": "demo {p} --student tiny --overwrite",
    "cache": "demo demo {p} --overwrite",
    "distill": "--teacher demo --data demo --steps 1 --overwrite --output {p}",
    "evaluate": "demo --output {p} --overwrite",
    "compare": "demo --output {p} --overwrite",
    "generate": "demo --prompts {p}/prompts.txt --output {p} --overwrite",
    "demo": "--output {p} --fresh",
}


def call(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model as somebody downloaded it, and a folder with files that look like sdkd's by their names."""
    root = tmp_path_factory.mktemp("outputs")
    shutil.copytree(teacher_path(), root / "own" / "m")
    (root / "own" / "m" / "unet" / "config.safetensors").write_bytes(b"x")
    files = {
        "thesis.txt": "years",
        "prompts.txt": "a cat",
        "settings.json": "{}",
        "index.json": "{}",
        "sdkd.json": "{}",
    }
    files |= {"bundle.json": "{}", "report.json": "{}", "evaluation.json": "{}", "training.jsonl": "{}\n"}
    files |= {"images/holiday.png": "x", "models/small/mine": "x", "metadata.jsonl": '{"file_name": "a.png"}'}
    for name, text in files.items():
        (root / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "p" / name).write_text(text)
    return {"m": root / "own" / "m", "p": root / "p"}


def everything(places: dict[str, Path]) -> dict[Path, bytes]:
    return {path: path.read_bytes() for place in places.values() for path in place.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [*((name, words, " the input ") for name, words in READS.items()),
     *((name, words, "") for name, words in FOREIGN.items())],
)  # fmt: skip
def test_nothing_is_lost(name: str, words: str, message: str, places: dict[str, Path]) -> None:
    before = everything(places)
    result = call(name, *words.format(**places).split())
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr or "did not write" in result.stderr
    assert "--overwrite" not in result.stderr
    assert everything(places) == before
    assert not [path.name for place in places.values() for path in place.parent.iterdir() if "partial" in path.name]


def test_a_picture_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty prompt is a prompt: its output is a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.png").write_bytes(b"x")
    result = call("generate", "demo", "", "-o", "x.png")
    assert "output 'x.png' already exists, and sdkd did not write it: choose another name" in result.stderr


def test_a_page_of_sdkd_is_drawn_again_and_no_other_file(tmp_path: Path) -> None:
    record = {"step": 1, "loss/total": 2.0, "lr": 1e-3, "seconds": 1.0, "images_per_second": 3.0}
    (tmp_path / "training.jsonl").write_text(json.dumps(record) + "\n")
    assert write_page(tmp_path) == write_page(tmp_path)
    other = tmp_path.parent / f"{tmp_path.name}.html"
    other.write_text("<title>mine</title>")
    with pytest.raises(OutputExistsError, match="already exists, and sdkd did not write it: choose another name"):
        write_page(tmp_path, other)
    other.unlink()
    assert write_page(tmp_path, other) == write_page(tmp_path, other)
    with pytest.raises(ValueError, match=r"output '.*training\.jsonl' lies in the input"):
        write_page(tmp_path, tmp_path / "training.jsonl")


def test_single_files_of_others_stay_in_spite_of_overwrite(tmp_path: Path) -> None:
    """A photo, a LoRA of another tool, a numbered image in a folder that is to be filled."""
    Image.new("RGB", (8, 8)).save(tmp_path / "mine.png")
    shutil.copy(tmp_path / "mine.png", tmp_path / "00001.png")
    write_lora(tmp_path / "one.safetensors", {"unet.lora_A.weight": torch.zeros(1)}, {})
    save_file({"unet.lora_A.weight": torch.zeros(1)}, tmp_path / "two.safetensors", {"format": "pt"})
    assert is_written_lora(tmp_path / "one.safetensors")
    (tmp_path / "prompts.txt").write_text("a\nb")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for words in (
        ("generate", "demo", "x", "-o", tmp_path / "mine.png"),
        ("generate", "demo", "--prompts", tmp_path / "prompts.txt", "-o", tmp_path),
        ("remap-lora", tmp_path / "one.safetensors", tmp_path / "two.safetensors", "--student", "tiny"),
        ("convert", "demo", tmp_path / "one.safetensors"),
    ):
        result = call(*map(str, words), "--overwrite")
        assert "already exists, and sdkd did not write it: choose another name" in result.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_image_of_sdkd_is_known_by_its_settings(tmp_path: Path) -> None:
    settings = dict.fromkeys(SETTINGS, "1")
    file = tmp_path / "x.png"
    file.write_bytes(encode_png(Image.new("RGB", (8, 8)), settings | {"prompt": "x" * 3000}))
    assert is_drawn_image(file)
    file.write_bytes(encode_png(Image.new("RGB", (8, 8)), {"prompt": "x", "seed": "1"}))
    assert not is_drawn_image(file)
    for other in (b"", b"\x89PNG\r\n\x1a\n", b"\x89PNG\r\n\x1a\n\xff\xff\xff\xffiTXt"):
        file.write_bytes(other)
        assert not is_drawn_image(file)


def test_captions_of_other_images_stay(tmp_path: Path) -> None:
    settings = dict.fromkeys(SETTINGS, "1")
    (tmp_path / "00000.png").write_bytes(encode_png(Image.new("RGB", (8, 8)), settings))
    write_metadata([tmp_path / "00000.png"], ["a cat"])
    (tmp_path / "prompts.txt").write_text("a cat")
    words = ["no-such/model.safetensors", "--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path)]
    ours = call("generate", *words)
    assert "metadata.jsonl" not in ours.stderr
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "holiday.jpg", "text": "the sea"}\n')
    theirs = call("generate", *words)
    assert "metadata.jsonl' holds captions of other images, which would be lost" in theirs.stderr


def test_a_demo_that_was_killed_while_it_wrote_its_report_goes_on(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "tiny-0.png").write_text("x")
    with pytest.raises(OutputExistsError, match="already holds images, which sdkd did not write"):
        check_outputs(tmp_path)
    record = {"schema": 3, "setup": {}, "environment": {}, "results": []}
    (tmp_path / ".report.json.12345678.partial").write_text(json.dumps(record))
    check_outputs(tmp_path)
    (tmp_path / "demo.png").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"demo\.png' already exists"):
        check_outputs(tmp_path)
