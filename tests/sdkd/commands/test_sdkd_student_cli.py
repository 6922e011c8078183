"""`sdkd student` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from diffusers import DiffusionPipeline
from processes import Dropping
from rich.console import Console
from safetensors.torch import load_file
from small_sdxl_unet import SDXL_UNET
from training_runs import small_vae

from sdkd.commands import student as student_cli
from sdkd.core.files import read_json
from sdkd.errors import InputError, ModelError, OutputExistsError
from sdkd.models.diffusers_folder import write_pipeline
from sdkd.models.generation import FEW_STEPS, entry
from sdkd.models.resolve import load_eager, resolve
from sdkd.students.blocks import build_student, count_parameters, student_config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("student") / "teacher"
    write_pipeline(helpers.tiny_pipeline(), path, about=entry(FEW_STEPS))
    return str(path)


def test_output_is_a_pipeline(teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student_cli.student(teacher, tmp_path / "out", "tiny")
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "down_blocks.0 attentions 0, attentions 1," in words
    assert "827,476 381,124 46.1 %" in words
    assert resolve(tmp_path / "out").generation == FEW_STEPS  # as its teacher is
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    expected = count_parameters(student_config(helpers.TEACHER_UNET, "tiny"))
    assert sum(parameter.numel() for parameter in pipe.unet.parameters()) == expected
    assert pipe("a star", num_inference_steps=2, output_type="np").images.shape == (1, 64, 64, 3)


def test_json_and_half(teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student_cli.student(teacher, tmp_path / "out", "bk-tiny", vae=str(small_vae()), half=True, json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["student"], found["teacher_parameters"], found["student_parameters"]) == ("bk-tiny", 827476, 381124)
    assert sum(row["student_parameters"] for row in found["parts"]) == 381124
    assert found["student_macs"] < found["teacher_macs"]
    mid = next(row for row in found["parts"] if row["part"] == "mid_block")
    assert (mid["kept"], mid["student_parameters"]) == ([], 0)
    weights = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert read_json(tmp_path / "out" / "model_index.json")["vae"] == ["diffusers", "AutoencoderTiny"]
    assert load_eager(tmp_path / "out").vae.config.scaling_factor == 1


def test_a_ctrl_c_that_a_del_drops_ends_it(teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(unet: Any, spec: Any) -> Any:
        thing = Dropping()
        del thing
        return build_student(unet, spec)

    monkeypatch.setattr(student_cli, "build_student", build)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        student_cli.student(teacher, tmp_path / "out", "tiny")
    assert list(tmp_path.iterdir()) == []


def test_output_is_not_overwritten(teacher: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "settings.json").write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match="already exists, and sdkd did not write what is in it"):
            student_cli.student(teacher, tmp_path, "tiny", overwrite=overwrite)
    assert (tmp_path / "file").read_text() == "mine"
    write_pipeline(helpers.tiny_pipeline(), tmp_path / "own", about={"teacher": "x", "student": "sd-tiny"})
    with pytest.raises(OutputExistsError, match="already exists: choose another folder or pass --overwrite"):
        student_cli.student(teacher, tmp_path / "own", "tiny")
    student_cli.student(teacher, tmp_path / "own", "bk-tiny", overwrite=True)
    assert read_json(tmp_path / "own" / "sdkd.json")["student"] == "bk-tiny"
    for output in (teacher, str(tmp_path / "own")):
        with pytest.raises(InputError, match="is the input"):
            student_cli.student(output, Path(output), "tiny", overwrite=True)


def test_bad_names_and_an_interrupted_run_leave_nothing(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt("stop")

    with pytest.raises(InputError, match="student 'huge' is unknown"):
        student_cli.student(teacher, tmp_path / "out", "huge")
    with pytest.raises(ModelError, match="'no-such-teacher' does not exist"):
        student_cli.student("no-such-teacher", tmp_path / "out", "tiny")
    monkeypatch.setattr("sdkd.models.diffusers_folder.write_json", interrupt)  # the last file
    with pytest.raises(KeyboardInterrupt, match="stop"):
        student_cli.student(teacher, tmp_path / "out", "tiny")
    assert list(tmp_path.iterdir()) == []


def test_a_report_says_which_transformer_blocks_go() -> None:
    found = student_cli.report(SDXL_UNET | {"transformer_layers_per_block": (1, 2, 6)}, "koala-700m")
    rows = {row["part"]: row for row in found["parts"]}
    assert rows["mid_block"]["kept"] == []
    deep = rows["down_blocks.2"]
    assert deep["kept"] == ["attentions.0", "resnets.0"]
    assert deep["dropped"][:3] == ["attentions.1", "resnets.1", "attentions.0.transformer_blocks.5"]
    assert len(deep["dropped"]) == 2 + 1
    assert sum(row["student_parameters"] for row in found["parts"]) == found["student_parameters"]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(*student_cli.tables(found))
    assert "1 block of attentions 0, attentions 1, resnets 1" in capture.get()
    assert "attentions 0+2, resnets 0+2, upsamplers" in capture.get()
