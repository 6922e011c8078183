"""Scheduler and tokenizer files of a bundle that are damaged: one BundleError, whatever the libraries raise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from graph_bundles import graph_bundle

from engines.pipelines.pipeline import _tokenizer, bundle_scheduler
from sdkd.bundle.manifest import Bundle
from sdkd.errors import BundleError
from sdkd.models.resolve import DEMO_WEIGHTS

INDEX: dict[str, Any] = {"scheduler": ["diffusers", "DDIMScheduler"]}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    made = graph_bundle(tmp_path, components=("unet",))
    for part in ("scheduler", "tokenizer"):
        shutil.copytree(DEMO_WEIGHTS / part, tmp_path / part)
    (made.path / "model_index.json").write_text(json.dumps(INDEX))
    return made


def test_whole_files_are_read(bundle: Bundle) -> None:
    assert type(bundle_scheduler(bundle)).__name__ == "DDIMScheduler"
    assert _tokenizer(bundle)("red").input_ids


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer/tokenizer.json", "{", "its tokenizer cannot be read"),
        ("tokenizer/tokenizer.json", '{"model": {"type": "BPE", "vocab": 3}}', "its tokenizer cannot be read"),
        ("tokenizer/tokenizer_config.json", "[" * 100_000, "its tokenizer cannot be read"),
        ("scheduler/scheduler_config.json", "{", r"scheduler_config.json' is not JSON"),
        ("scheduler/scheduler_config.json", "[]", r"scheduler_config.json' is damaged \(the file is a list"),
        (
            "scheduler/scheduler_config.json",
            json.dumps({"num_train_timesteps": 10**9}),
            "num_train_timesteps .* too large",
        ),
        ("scheduler/scheduler_config.json", json.dumps({"beta_schedule": 7}), "its scheduler cannot be read"),
    ],
)
def test_damaged_files_are_one_error(bundle: Bundle, name: str, text: str, message: str) -> None:
    (bundle.path / name).write_text(text)
    read = _tokenizer if name.startswith("tokenizer") else bundle_scheduler
    with pytest.raises(BundleError, match=message):
        read(bundle)


@pytest.mark.parametrize("entry", [None, "x", ["diffusers"], ["diffusers", "AutoencoderKL"], ["diffusers", 3]])
def test_only_schedulers_are_taken_for_one(bundle: Bundle, entry: Any) -> None:
    (bundle.path / "model_index.json").write_text(json.dumps({"scheduler": entry}))
    with pytest.raises(BundleError, match="names an unknown scheduler"):
        bundle_scheduler(bundle)
