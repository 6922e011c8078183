"""Two processes at batch B learn what one learns at batch 2 B."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed_run
import pytest
import torch
from safetensors.torch import load_file

SETTINGS: dict[str, Any] = {
    "steps": 4,
    "accumulation": 2,
    "precision": "fp32",
    "device": "cpu",
    "log_every": 2,
    "save_every": 2,
    "learning_rate": 1e-3,
    "warmup": 2,
    "caption_dropout": 0.3,
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "distill": {"snr_gamma": 5.0},
    "consistency": {"objective": "consistency", "target_ema": 0.9, "feature_weight": 0.1, "huber_c": 1.0},
}


def launched(folder: Path, processes: int, **more: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    folder.mkdir()
    settings = SETTINGS | more
    if processes == 1:
        distributed_run.main(folder, settings)
    else:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *launcher, distributed_run.__file__, str(folder), json.dumps(settings)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "world").read_text() == str(processes)
    log = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    return load_file(folder / "weights.safetensors"), log


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_processes_equal_one_with_twice_the_batch(objective: str, tmp_path: Path) -> None:
    one, log_of_one = launched(tmp_path / "one", 1, batch_size=4, **OBJECTIVES[objective])
    two, log_of_two = launched(tmp_path / "two", 2, batch_size=2, **OBJECTIVES[objective])
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-5, msg=name)
    for first, second in zip(log_of_one, log_of_two, strict=True):
        assert first["step"] == second["step"]
        assert first.keys() == second.keys()
        for name in (name for name in first if name.startswith("loss") or name == "grad_norm"):
            torch.testing.assert_close(second[name], first[name], rtol=1e-4, atol=1e-5, msg=name)
    record = json.loads((tmp_path / "two" / "checkpoint-2" / "checkpoint.json").read_text())
    assert record["processes"] == 2
    states = load_file(tmp_path / "two" / "checkpoint-2" / "random.safetensors")
    assert sorted(states) == ["cpu.0", "cpu.1"]


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """As launched processes have it: with more, sums are taken in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("_one_thread")
def test_two_processes_round_by_what_the_first_has_recorded(tmp_path: Path) -> None:
    """Not bit for bit as one: a sum in another order may be rounded to the next code."""
    logs = [
        launched(tmp_path / str(count), count, batch_size=4 // count, quantize="int8", calibrate_images=1)[1]
        for count in (1, 2)
    ]
    one, two = ((tmp_path / name / "checkpoint-2" / "calibration.safetensors").read_bytes() for name in "12")
    assert one == two
    for first, second in zip(*logs, strict=True):
        assert second["rounded_layers"] == first["rounded_layers"] > 10
        torch.testing.assert_close(second["loss/total"], first["loss/total"], rtol=1e-2, atol=0)
