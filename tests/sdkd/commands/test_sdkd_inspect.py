"""`sdkd inspect`: contracts, profiles, layers, memory and every reason why something must be made again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from graph_bundles import graph_bundle
from typer.testing import CliRunner

from engines.pipelines.layers import count_layers, read_inspector
from export import build_engine
from sdkd.bundle.manifest import Bundle
from sdkd.commands.inspect import examine, inspect
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.errors import BundleError
from sdkd.models.generation import FEW_STEPS, entry

app = typer.Typer()
app.command()(inspect)
SMALL = ShapeRanges(Range(1, 1, 2), Range.fixed(32), Range.fixed(32), Range.fixed(77))


def _run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every component on ONNX Runtime, the UNet on OpenVINO, too; made to be run with few steps."""
    bundle = graph_bundle(tmp_path_factory.mktemp("inspect") / "bundle")
    replace(bundle, manifest=replace(bundle.manifest, source=entry(FEW_STEPS))).save()
    build_engine(bundle.path, "onnxruntime", ranges=SMALL)
    return build_engine(bundle.path, "openvino", ranges=SMALL, components=["unet"]).path


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Bundle:
    """A copy that a test may damage."""
    return Bundle.open(shutil.copytree(made, tmp_path / "copy"))


def test_a_fresh_bundle(made: Path) -> None:
    found = examine(Bundle.open(made), layers=True)
    rows = {(row["slot"], row["component"]): row for row in found["engines"]}
    assert [row["problems"] for row in (*found["components"], *found["engines"])] == [[]] * 9
    unet = rows["onnxruntime", "unet"]
    assert unet["profiles"] == [SMALL.to_json()]
    assert {"type": "Conv", "precision": "fp32", "count": 1} in unet["layers"]
    assert {row["precision"] for row in rows["openvino", "unet"]["layers"]} == {"fp32"}
    assert {"Convolution", "FullyConnected"} <= {row["type"] for row in rows["openvino", "unet"]["layers"]}
    assert unet["memory_bytes"] == unet["bytes"] + 2 * 4 * (4 * 8 * 256**2)  # scores of 2 images, with guidance
    contract = found["components"][1]["contract"]
    assert [tensor["name"] for tensor in contract["inputs"]] == ["sample", "timestep", "encoder_hidden_states"]
    json.dumps(found)


def test_layers_of_half_precision(tmp_path: Path) -> None:
    half = build_engine(graph_bundle(tmp_path / "bundle", "fp16"), "onnxruntime", components=["unet"])
    layers = {(kind, precision): count for kind, precision, count in count_layers(half, "onnxruntime", "unet")}
    assert ("Cast", "fp32") in layers  # the CPU has no half-precision convolution: wrapped in casts
    assert ("Cast", "fp16") in layers


def test_what_tensorrt_says_of_its_layers() -> None:
    said = {
        "Layers": [
            {"LayerType": "Myelin", "Outputs": [{"Format/Datatype": "Row major linear FP16 format"}]},
            {"LayerType": "x", "ParameterType": "Convolution", "Outputs": [{"Format/Datatype": "Half"}]},
            {"LayerType": "Cast", "Outputs": [{"Format/Datatype": "BFloat16"}]},
            {"LayerType": "NoOp", "Outputs": []},
            "only a name",
        ],
        "Bindings": ["sample"],
    }
    assert list(read_inspector(json.dumps(said))) == [
        ("Myelin", "fp16"),
        ("Convolution", "fp16"),
        ("Cast", "bf16"),
        ("NoOp", "unknown"),
        ("unknown", "unknown"),
    ]


@pytest.mark.parametrize("arguments", [(), ("--details",)])
def test_tables_in_80_columns(made: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = _run(made, *arguments).stdout
    assert max(len(line) for line in said.splitlines() if line[:1] in "┃│┏┡├└") <= 80
    takes = "  takes batch 1..2, height 32 px, width 32 px, 77 tokens"
    assert "made to be run with 4 steps, guidance 1, LCMScheduler" in said
    assert all(word in said for word in (takes, "text_encoder", "vae_encoder", "onnxruntime", "openvino", "fresh"))
    for detail in ("batch x 4 x height x width", "FullyConnected", "optimization: extended"):
        assert (detail in said) == bool(arguments)


def test_for_programs(made: Path) -> None:
    found = json.loads(_run(made, "--json").stdout)
    assert [row["component"] for row in found["components"]] == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    assert found["engines"][0]["layers"] is None
    assert found["generation"] == FEW_STEPS.to_json()
    assert isinstance(json.loads(_run(made, "--json", "--details").stdout)["engines"][0]["layers"], list)


def test_every_reason_is_given(bundle: Bundle) -> None:
    record = bundle.engine("openvino", "unet")
    stale = replace(record, onnx_sha256="0", environment={**record.environment, "openvino": "1.0", "cpu": "Other 9000"})
    replace(bundle, manifest=bundle.manifest.with_engine(stale)).save()
    (bundle.path / record.files[0].path).write_bytes(b"altered")
    with pytest.raises(
        BundleError, match=r"4 of the parts need repair: engines/openvino/unet\.blob has 7 bytes instead"
    ):
        _run(bundle.path)
    problems = examine(Bundle.open(bundle.path))["engines"][-1]["problems"]
    assert len(problems) == 4
    for part in ("truncated or altered", "exported again", "built with openvino 1.0", "built with cpu Other 9000"):
        assert any(part in problem for problem in problems), part


def test_an_altered_engine_is_never_opened(bundle: Bundle) -> None:
    path = bundle.path / bundle.engine("openvino", "unet").files[0].path
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found = examine(bundle, hashes=False, layers=True)["engines"][-1]
    assert found["problems"] == []  # nobody looked
    assert "was altered: its SHA-256 differs" in found["layers"]
    with pytest.raises(BundleError, match=r"unet\.blob was altered: its SHA-256 differs"):
        count_layers(bundle, "openvino", "unet")


def test_without_a_gpu_its_layers_are_not_known(tmp_path: Path) -> None:
    import torch

    pytest.importorskip("tensorrt_rtx")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    half = build_engine(graph_bundle(tmp_path / "bundle", "fp16"), "tensorrt-rtx", components=["unet"])
    found = examine(half, layers=True)["engines"][0]
    assert "needs an NVIDIA GPU with a driver" in found["layers"]
    assert found["memory_bytes"] > found["bytes"]


def test_another_vae_is_named_and_repairs_keep_it(bundle: Bundle) -> None:
    changed = replace(bundle.manifest, source={"model": "demo", "vae": "my vae", "controlnet": "edges"})
    found = replace(bundle, manifest=changed)
    found.save()
    assert "demo, vae my vae, controlnet edges" in _run(bundle.path).stdout
    wanted = f"sdkd export demo {bundle.path} --vae 'my vae' --controlnet edges --overwrite"
    assert found.repair(found.component("vae_decoder")) == wanted
