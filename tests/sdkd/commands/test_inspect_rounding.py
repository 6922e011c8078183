"""What `sdkd inspect` says of an engine in eight bits: the decision, its errors, and layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from graph_bundles import graph_bundle
from quantized_builds import rounded_bundle
from quantized_records import FLAGS, planted_engine
from typer.testing import CliRunner

from export import build_engine
from sdkd.bundle.manifest import Bundle
from sdkd.commands.inspect import inspect
from sdkd.core.profiles import Range, ShapeRanges

app = typer.Typer()
app.command()(inspect)
SMALL = ShapeRanges(Range(1, 1, 2), Range.fixed(32), Range.fixed(32), Range.fixed(77))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A UNet on ONNX Runtime, whose engine a planted record calls one of int8, too."""
    made = build_engine(graph_bundle(tmp_path / "bundle").path, "onnxruntime", ranges=SMALL, components=["unet"])
    return planted_engine(made, "onnxruntime-int8")


def said(bundle: Bundle, *options: str) -> str:
    result: Any = CliRunner().invoke(app, [str(bundle.path), *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def test_the_decision_in_80_columns(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = said(bundle).splitlines()
    for line in (
        "  unet: activations in 8 bits with a zero point, weights in 7 bits per output channel, linear layers smoothed "
        "(alpha 0.5)",
        "  unet: 21 layers rounded, 3 in float: 1 (4 channels in: no time to gain, and the noise itself passes); 2 "
        "(rounded alone it changes the prediction)",
        "  unet: prediction at most 3.4 % from the float one (limit 10 %)",
        "  unet: images 34.2 to 36.5 dB PSNR from float ones",
        "  unet: 1.42× as fast as fp32 (a UNet call: int8 100 ms, fp32 150 ms)",
    ):
        assert lines.count(line) == 1, line
    assert max(len(line) for line in lines if line[:1] in "┃│┏┡├└") <= 80
    table = [line.replace(" ", "") for line in lines if line.startswith("│")]
    assert "│981│3.1%│3.4%│" in table
    assert "│21│1.2%│1.1%│" in table
    assert "mid_block" not in "".join(lines)


def test_details_name_every_layer_the_most_sensitive_first(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = said(bundle, "--details")
    assert max(len(line) for line in text.splitlines() if line[:1] in "┃│┏┡├└") <= 80
    alone = [line.replace(" ", "") for line in text[text.index("Layers rounded alone") :].splitlines()]
    rows = [line for line in alone if line.startswith("│") and "." in line][:3]
    assert rows == [
        "│mid_block.resnets.0.conv1│8.1%│float│",
        "│up_blocks.0.resnets.0.conv1│5%│float│",
        "│down_blocks.0.resnets.0.conv1│0.35%│rounded│",
    ]
    assert "optimization: extended" in text
    assert "float_layers" not in text


def test_an_engine_that_nobody_ran_and_one_over_the_limit_are_called_so(bundle: Bundle) -> None:
    quality = {**FLAGS["quality"], "engine": None, "image_psnr_db": None, "limit": 0.01}
    bundle = planted_engine(bundle, "onnxruntime-int8", quality=quality, speed=None, sensitivity={}, float_layers={})
    text = said(bundle, "--details")
    assert "at most 3.1 % from the float one (limit 1 %), which is over it, rounded in PyTorch" in text
    assert "the engine did not run where it was built" in text
    assert "its speed was not measured against half precision" in text
    assert "  unet: 21 layers rounded, 0 in float\n" in text
    assert "how much single layers change was not recorded" in text
    assert "dB PSNR" not in text


def test_for_programs(bundle: Bundle) -> None:
    rows = {row["slot"]: row for row in json.loads(said(bundle, "--json"))["engines"]}
    assert rows["onnxruntime"]["quantized"] is None
    found = rows["onnxruntime-int8"]
    assert found["flags"]["quality"] == FLAGS["quality"]
    assert (found["quantized"]["worst_error"], found["quantized"]["within_limit"]) == (0.034, True)
    assert (found["quantized"]["rounded_layers"], found["quantized"]["float_layers"]) == (21, 3)
    assert found["quantized"]["most_sensitive"][0] == {"layer": "mid_block.resnets.0.conv1", "squared_error": 0.0066}


def test_engines_as_they_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    bundle = rounded_bundle()
    text = said(bundle, "--details")
    assert max(len(line) for line in text.splitlines() if line[:1] in "┃│┏┡├└") <= 80
    lines = text.splitlines()
    assert any(line.startswith("  vae_decoder: stays float (its convolutions gain nothing") for line in lines)
    assert "  text_encoder: activations in float, weights in 8 bits per output channel" in lines
    assert any(" layers rounded, " in line and " in float: " in line for line in lines)
    assert any(line.startswith("  in float, a vector per image: no time to gain: ") for line in lines)
    assert any("× as fast as " in line for line in lines)
    rows = json.loads(said(bundle, "--json"))["engines"]
    found = {(row["slot"], row["component"]): row["quantized"] for row in rows}
    for slot in ("openvino-int8", "onnxruntime-int8"):
        assert found[slot, "unet"]["within_limit"] is True
        assert found[slot, "unet"]["rounded_layers"] > 0
        assert found[slot, "vae_decoder"] is None
