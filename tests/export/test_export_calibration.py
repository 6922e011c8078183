"""What a student was trained to round by comes along into its bundle, where it is of the weights that are exported."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import fixed_weights, tiny_pipeline
from lora_files import kohya
from safetensors.torch import save_file

from export.pipeline import export_pipeline
from export.source import open_source
from sdkd.bundle.manifest import Bundle
from sdkd.bundle.quantized import CALIBRATION_FILE
from sdkd.errors import ModelError
from sdkd.models.diffusers_folder import component_digest, write_pipeline
from sdkd.quantization.calibration import BESIDE_UNET, Calibration

export: Any = partial(export_pipeline, components=("unet",), verify=False)


@pytest.fixture(autouse=True)
def without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing takes long, and is not what these tests are about."""
    monkeypatch.setattr("export.pipeline.export_components", lambda *_: {})


def calibration(weights: str) -> Calibration:
    return Calibration(weights, {"seeds": [0]}, {}, (), np.zeros((1, 4, 8, 8), np.float32))


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A pipeline's folder with a calibration of its UNet."""
    write_pipeline(tiny_pipeline(student="tiny"), folder := tmp_path / "student")
    calibration(component_digest(folder / "unet")).save(folder / "unet" / BESIDE_UNET)
    return folder


def test_the_bundle_holds_it_for_the_weights_that_its_record_names(student: Path, tmp_path: Path) -> None:
    bundle = export(student, tmp_path / "bundle")
    found = bundle.path / CALIBRATION_FILE
    assert found.read_bytes() == (student / "unet" / BESIDE_UNET).read_bytes()
    assert Calibration.load(found).weights == open_source(str(student), {}).digest("unet")  # the record's source_sha256


def test_it_may_be_recorded_again(student: Path, tmp_path: Path) -> None:
    bundle = export(student, tmp_path / "bundle")
    calibration("1" * 64).save(bundle.path / CALIBRATION_FILE)
    assert Bundle.open(bundle.path).manifest == bundle.manifest


def test_it_is_left_out_where_the_weights_are_others(student: Path, tmp_path: Path) -> None:
    unet = tiny_pipeline(student="tiny").unet
    layer = next(name for name, _ in unet.named_modules() if name.endswith("to_q"))
    save_file(kohya(unet, [layer]), lora := tmp_path / "lora.safetensors")
    said: list[str] = []
    fused = export(student, tmp_path / "fused", loras=[lora], progress=lambda text, share: said.append(text))
    assert not (fused.path / CALIBRATION_FILE).exists()
    assert "the calibration beside the UNet is of other weights: left out" in said
    shutil.copytree(student, other := tmp_path / "other")
    fixed_weights(unet, 9).save_pretrained(other / "unet")
    assert not (export(other, tmp_path / "again").path / CALIBRATION_FILE).exists()
    assert not (export(student, tmp_path / "vae", components=("vae_decoder",)).path / CALIBRATION_FILE).exists()


def test_a_damaged_one_is_an_error(student: Path, tmp_path: Path) -> None:
    (student / "unet" / BESIDE_UNET).write_bytes(b"no")
    with pytest.raises(ModelError, match="calibrate again"):
        export(student, tmp_path / "bundle")
