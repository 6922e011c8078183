"""Optimum as a subject of a comparison, in its own environment, with our packages as they are here."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import optimum_compare
import pytest
import small_bundles
from interop_environment import ROOT

from export import export_pipeline
from sdkd.models.diffusers_folder import write_pipeline

pytestmark = [pytest.mark.interop, pytest.mark.timeout(1800)]  # the first run installs Optimum


def test_optimum_is_compared_with_eager(tmp_path: Path, python: Path) -> None:
    pipe = small_bundles.small_pipeline()
    write_pipeline(pipe, tmp_path / "model")
    bundle = export_pipeline(pipe, tmp_path / "bundle").path
    command = [python, optimum_compare.__file__, tmp_path / "model", bundle, tmp_path / "report.json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    eager, optimum = report["results"]
    assert (eager["target"], optimum["target"], optimum["precision"]) == ("eager", "optimum", "fp32")
    assert optimum["verdict"]["ok"] is True, optimum["verdict"]
    assert optimum["against_eager"]["psnr_min_db"] is None or optimum["against_eager"]["psnr_min_db"] > 60
    assert optimum["unet_parameters"] == eager["unet_parameters"]
    assert optimum["bytes_on_disk"] == sum(file.stat().st_size for file in bundle.glob("*/model.onnx*"))
    assert optimum["repeatable"] is True
    assert min(optimum["text_encoder_ms"]["median"], optimum["vae_decode_ms"]["median"], optimum["peak_rss_bytes"]) > 0
    assert set(optimum["step_speedup"]) == {"eager"}
    assert (report["notes"], report["setup"]["isolated"]) == ([], True)
