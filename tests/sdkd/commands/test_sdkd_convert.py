"""`sdkd convert` as a user runs it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from graph_bundles import graph_bundle
from lora_files import kohya
from safetensors.torch import save_file
from small_families import differing, loaded, mini_models

from sdkd.commands.convert import convert
from sdkd.errors import InputError
from sdkd.models.fused import with_loras
from sdkd.models.resolve import load_component, resolve


@pytest.fixture(autouse=True, scope="module")
def mini() -> Iterator[None]:
    with mini_models():
        yield


def test_a_model_with_a_lora_becomes_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet = load_component("random:mini", "unet")
    layers = [name for name, _ in unet.named_modules() if name.endswith(("to_q", "to_v"))]
    lora = tmp_path / "lora.safetensors"
    save_file(kohya(unet, layers, size=0.01), lora)
    convert("random:mini", tmp_path / "one.safetensors", "fp32", lora=[f"{lora}:0.5"])
    assert "one.safetensors (900 tensors in fp32)." in " ".join(capsys.readouterr().out.split())
    expected = load_component(with_loras(resolve("random:mini"), [f"{lora}:0.5"]), "unet")
    written = loaded(tmp_path / "one.safetensors")
    assert differing(written, SimpleNamespace(unet=expected), ("unet",)) == []
    assert len(differing(written, SimpleNamespace(unet=unet), ("unet",))) == len(layers)

    convert("random:mini2", tmp_path / "two.safetensors", json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["metadata"]["modelspec.prediction_type"] == "v"
    assert found["notes"][-1].startswith("it predicts v_prediction")


def test_what_is_refused(tmp_path: Path) -> None:
    graph_bundle(tmp_path / "bundle")
    with pytest.raises(
        InputError, match="is a bundle, whose weights are in graphs: give the model that it was made from"
    ):
        convert(str(tmp_path / "bundle"), tmp_path / "one.safetensors")
    with pytest.raises(InputError, match=r"lora\.safetensors.* does not exist"):
        convert("random:mini", tmp_path / "one.safetensors", lora=[str(tmp_path / "lora.safetensors")])
