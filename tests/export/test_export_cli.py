"""`sdkd export`: a table or JSON, and one message for what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from small_exports import small_bundle, small_pipeline
from typer.testing import CliRunner

from export.cli import export, notes, summary
from sdkd.bundle.manifest import Bundle
from sdkd.errors import InputError, OutputExistsError
from sdkd.models.generation import Generation
from sdkd.models.resolve import resolve

runner = CliRunner()
app = typer.Typer()
app.command()(export)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder."""
    folder = tmp_path_factory.mktemp("model") / "small"
    small_pipeline().save_pretrained(folder)
    return folder


def test_json_alone_is_on_standard_output_with_units_in_the_names(model: Path, tmp_path: Path) -> None:
    words = [str(model), str(tmp_path / "b"), "--components", "text_encoder", "--precision", "fp16", "--json"]
    result = runner.invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    (part,) = found["components"]
    assert part["component"] == "text_encoder"
    assert part["precision"] == "fp16"
    assert part["bytes"] == (tmp_path / "b" / "text_encoder" / "model.onnx").stat().st_size
    assert 0 < part["relative_error"] < 5e-3
    assert "text_encoder: exporting to ONNX" in result.stderr


def test_the_table_says_when_nothing_was_checked_and_what_comes_next(model: Path, tmp_path: Path) -> None:
    words = [str(model), str(tmp_path / "b"), "--components", "text_encoder", "--no-verify", "--opset", "22"]
    words += ["--run-with", "steps=2,guidance=1,scheduler=tcd"]
    result = runner.invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    assert "Not compared with PyTorch" in result.stdout
    assert "Engines need unet, vae_decoder, too: export the model again with them." in result.stdout
    row = next(line for line in result.stdout.splitlines() if "text_encoder" in line)
    assert " 22 " in row
    assert "38,816" in row
    assert json.loads((tmp_path / "b" / "bundle.json").read_text())["components"]["text_encoder"]["parity"] is None
    assert Bundle.open(tmp_path / "b").component("text_encoder").parity is None
    assert resolve(tmp_path / "b").generation == Generation(2, 1.0, "TCDScheduler")


def test_the_summary_has_every_component_and_its_error() -> None:
    parts = summary(small_bundle())["components"]
    assert [part["component"] for part in parts] == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    assert all(0 < part["max_abs_error"] < 1e-4 and part["nodes"] > 50 for part in parts)


def test_what_is_only_known_of_a_model_by_a_guess_is_said() -> None:
    bundle = small_bundle()
    source = {"model": "/models/[mine].safetensors", "notes": ["predicts epsilon (a guess)", "holds EMA weights"]}
    told = notes(Bundle(bundle.path, replace(bundle.manifest, source=source)))
    assert told[:2] == ["[mine].safetensors: predicts epsilon (a guess).", "[mine].safetensors: holds EMA weights."]
    assert notes(bundle) == told[2:]


def test_a_model_that_is_none_and_an_output_that_is_there_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is the input"):
        runner.invoke(app, [str(model), str(model)], catch_exceptions=False)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.txt").write_text("x")
    with pytest.raises(OutputExistsError, match="already exists"):
        runner.invoke(app, [str(model), str(tmp_path / "there")], catch_exceptions=False)
    with pytest.raises(InputError, match="precision 'half' is unknown"):
        runner.invoke(app, [str(model), str(tmp_path / "b"), "--precision", "half"], catch_exceptions=False)


def test_the_module_loads_without_torch() -> None:
    import subprocess
    import sys

    code = "import sys, export.cli; print(sorted({'torch', 'diffusers', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "[]\n"
