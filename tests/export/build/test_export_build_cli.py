"""`sdkd build-engine` as people type it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from graph_bundles import graph_bundle
from helpers import tiny_pipeline
from training_runs import small_vae
from typer.testing import CliRunner

from export.build_cli import build_engine, default_name
from sdkd.bundle.manifest import Bundle
from sdkd.errors import InputError, ModelError, OutputExistsError
from sdkd.models.generation import FORM

app = typer.Typer()
app.command()(build_engine)


def _run(*arguments: object) -> Any:
    """The command's result; an SdkdError is raised, as sdkd.cli expects."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A fresh fp32 bundle of small graphs."""
    return graph_bundle(tmp_path / "bundle")


def test_table_for_people(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = _run(bundle.path, "--target", "onnxruntime", "--components", "unet,vae_decoder")
    assert result.exit_code == 0
    assert "Engines for onnxruntime in" in result.stdout
    rows = [line for line in result.stdout.splitlines() if "fp32" in line]
    assert len(rows) == 2
    assert "unet" in rows[0]
    assert "takes batch 1..4, height 32 px, width 32 px, 77 tokens" in result.stdout
    assert rows[0].rstrip("│ ┃").endswith("built")
    assert f"sdkd generate {bundle.path} PROMPT --target onnxruntime" in result.stdout
    monkeypatch.setenv("COLUMNS", "80")
    again = _run(bundle.path, "--target", "onnxruntime", "--components", "unet")
    assert "reused" in again.stdout
    assert max(len(line) for line in again.stdout.splitlines() if line[:1] in "┃│┏┡├└") <= 80
    forced = _run(bundle.path, "--target", "onnxruntime", "--components", "unet", "--force")
    assert "reused" not in forced.stdout


def test_json_for_programs(bundle: Bundle) -> None:
    options = ("--size", "32..64", "--batch", "1..2", "--json")
    result = _run(bundle.path, "-t", "onnxruntime", "--components", "unet", "--components", "vae_decoder", *options)
    data = json.loads(result.stdout)
    assert data["bundle"] == str(bundle.path)
    assert data["slot"] == "onnxruntime"
    assert [engine["component"] for engine in data["engines"]] == ["unet", "vae_decoder"]
    engine = data["engines"][0]
    sides = {"height": [32, 32, 64], "width": [32, 32, 64]}
    assert engine["ranges"] == {"batch": [1, 1, 2], **sides, "sequence": [77, 77, 77]}
    assert engine["reused"] is False
    assert engine["parity"]["finite"] is True
    assert engine["bytes"] > 0
    assert Bundle.open(bundle.path).engine("onnxruntime", "unet").ranges.height.max == 64


def test_several_profiles(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    bundle = graph_bundle(tmp_path / "bundle", "fp16")
    profiles = ("--profile", "size=32,batch=1..4", "--profile", "size=32..64,size-opt=64", "--batch", "1")
    options = ("--optimization-level", "2", "--compute-capability", "8.9, 8.6", "--workspace-gb", "1", "--json")
    data = json.loads(_run(bundle.path, "-t", "tensorrt-rtx", "--components", "unet", *profiles, *options).stdout)
    (engine,) = data["engines"]
    assert [(one["batch"], one["height"]) for one in engine["profiles"]] == [
        ([1, 1, 4], [32, 32, 32]),
        ([1, 1, 1], [32, 64, 64]),
    ]
    assert engine["ranges"]["height"] == [32, 32, 64]
    assert engine["built_for"] == ["8.6", "8.9"]
    record = Bundle.open(bundle.path).engine("tensorrt-rtx", "unet")
    assert record.flags["options"] == {
        "optimization_level": 2,
        "compute_capabilities": ["8.6", "8.9"],
        "workspace_gb": 1.0,
    }
    assert record.flags["plan_accelerators"] == ["sm86", "sm89"]
    assert record.flags["activation_resize"] == hasattr(trt.PreviewFeature, "RUNTIME_ACTIVATION_RESIZE_10_10")
    assert bundle.stale_reasons(record, {"compute_capability": "9.0"}) == [
        "built for compute capability 8.6, 8.9, here it is 9.0 (sdkd doctor --try tries that one)"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-t", "onnxruntime", "--size", "501"), r"height 501 is not a multiple of 4 pixels"),
        (("-t", "onnxruntime", "--batch", "4..1"), r"range 4..4..1 is not ordered"),
        (("-t", "onnxruntime", "--tokens", "100"), r"100 tokens: this text encoder has 77 positions"),
        (("-t", "onnxruntime", "--components", "vae"), r"component 'vae' is unknown"),
        (("-t", "trt"), r"target 'trt' is unknown: choose one of"),
        (
            ("-t", "onnxruntime", "--size", "32..64", "--size-opt", "96"),
            r"--size-opt 96 is not one height within 32..64",
        ),
        (
            ("-t", "onnxruntime", "--refit", "lora"),
            r"--refit cannot be had for onnxruntime: it is an option of tensorrt",
        ),
        (("-t", "openvino", "--workspace-gb", "1"), r"--workspace-gb cannot be had for openvino"),
        (
            ("-t", "onnxruntime", "--precision", "half"),
            r"precision 'half' of an engine is unknown: choose one of fp32, fp16, bf16",
        ),
        (("-t", "onnxruntime", "--run-with", FORM), r"is a bundle already, .* \(as most models\): export its model"),
        (("-t", "onnxruntime", "-o", "elsewhere"), r"is a bundle already, engines go into it: leave out --output"),
    ],
)
def test_refused(bundle: Bundle, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _run(bundle.path, *arguments)
    assert not (bundle.path / "engines").exists()


def test_no_target_is_bad_usage(bundle: Bundle) -> None:
    assert _run(bundle.path).exit_code == 2


def test_a_model_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"does not exist"):
        _run(tmp_path / "nothing", "-t", "onnxruntime", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("segmind/tiny-sd", "tiny-sd"),
        ("random:sd15-tiny", "random-sd15-tiny"),
        ("demo", "demo"),
        ("models/v1-5.safetensors", "v1-5"),
        ("../..", "model"),
    ],
)
def test_default_folder_names_are_plain(model: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / "---" / "a" / "b"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    assert default_name(model) == name


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline's folder."""
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "500"), r"height 500 is not a multiple of 64 pixels, as this model needs: use 448 or 512"),
        (("--batch", "4..1"), r"range 4..4..1 is not ordered"),
        (("--components", "vae"), r"component 'vae' is unknown"),
        (("--refit", "all"), r"--refit cannot be had for onnxruntime"),
        (("--profile", "size=64", "--profile", "size=96"), r"height 96 is not a multiple of 64 pixels"),
        (("--run-with", "steps=4"), r"'steps=4' does not say how a model is to be run: give all three of steps=4,gui"),
        (("--vae", "nowhere"), r"vae 'nowhere' is no folder: give the folder that save_pretrained wrote"),
        (("--precision", "bf16"), r"the ONNX graph is bf16, which onnxruntime cannot run"),
    ],
)
def test_what_is_wrong_is_refused_before_the_export(
    pipeline: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises((InputError, ModelError), match=message):
        _run(pipeline, "-t", "onnxruntime", "-o", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_model_is_exported_once_and_then_reused(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = json.loads(_run(pipeline, "-t", "openvino", "--json").stdout)
    assert first["bundle"] == "artifacts/tiny"
    assert [engine["reused"] for engine in first["engines"]] == [False] * 4
    again = json.loads(_run(pipeline, "-t", "openvino", "--json").stdout)
    assert [engine["reused"] for engine in again["engines"]] == [True] * 4
    with pytest.raises(OutputExistsError, match=r"a model to run with any settings, not 4 steps, guidance 1, LCMSch"):
        _run(pipeline, "-t", "openvino", "--run-with", "steps=4,guidance=1,scheduler=lcm")
    with pytest.raises(OutputExistsError, match=r"holds a bundle of precision fp32, not fp16.*--overwrite"):
        _run(pipeline, "-t", "tensorrt-rtx", "-o", "artifacts/tiny")
    with pytest.raises(OutputExistsError, match=r"holds a bundle of other weights \(vae_decoder, vae_encoder\):"):
        _run(pipeline, "-t", "openvino", "-o", "artifacts/tiny", "--vae", small_vae())
    small = ("-t", "openvino", "-o", "small", "--vae", small_vae(), "--json")
    assert [engine["reused"] for engine in json.loads(_run(pipeline, *small).stdout)["engines"]] == [False] * 4
    assert [engine["reused"] for engine in json.loads(_run(pipeline, *small).stdout)["engines"]] == [True] * 4
    made = Bundle.open(tmp_path / "small")
    assert f"--vae {small_vae()} --overwrite" in made.repair(made.component("vae_decoder"))
    other = tmp_path / "other"
    tiny_pipeline(seed=7).save_pretrained(other)
    with pytest.raises(OutputExistsError, match=r"holds a bundle of other weights.*--overwrite"):
        _run(other, "-t", "openvino", "-o", "artifacts/tiny")
