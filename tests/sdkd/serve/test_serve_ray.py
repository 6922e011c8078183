"""Two replicas of the server on Ray Serve."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engines import load_pipeline

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_two_replicas_draw_what_one_pipeline_draws(bundle: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # No usage statistics: Ray would send them.
    environment = {"BUNDLE": str(bundle), "PORT": str(port), "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    script = Path(__file__).with_name("replicas.py")
    done = subprocess.run([sys.executable, script], env=os.environ | environment, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith(b'{"images"')))
    assert len(found["images"]) == 12
    assert max(found["counts"]) < 12  # no replica drew all
    pipe = load_pipeline(bundle, "onnxruntime")
    pipe.set_progress_bar_config(disable=True)
    for image in found["images"][:3]:
        generator = torch.Generator().manual_seed(image["seed"])
        size = {"num_inference_steps": 2, "height": 32, "width": 32}
        expected = np.asarray(pipe("a cat", generator=generator, **size).images[0], dtype=np.int16)
        drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["png"]))), dtype=np.int16)
        assert np.abs(drawn - expected).max() <= 1
