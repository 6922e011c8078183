"""stable-diffusion.cpp as a subject, built in the other projects' environment, on a full-size student's weights."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import sdcpp_images
from interop_environment import ROOT

pytestmark = [pytest.mark.interop, pytest.mark.timeout(1800)]  # the first run builds it


def test_stable_diffusion_cpp_draws_what_eager_draws(tmp_path: Path, python: Path) -> None:
    command = [str(python), sdcpp_images.__file__, str(tmp_path / "report.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "report.json").read_text())
    assert min(found["psnr_db"]) > 35, found
    assert found["apart_db"] < 25  # the two seeds' images
    assert found["other"] == {"parameters": found["eager"]["parameters"], "files": [], "gone": True}
    assert {part: len(times) for part, times in found["seconds"].items()} == {
        "unet": 2, "text_encoder": 1, "vae_decoder": 1, "again": 1
    }  # fmt: skip
    assert min(time for times in found["seconds"].values() for time in times) > 0
