"""The server that tests of its APIs share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from drawn import save_lora
from engine_bundles import pipeline_bundle, without_slot
from made_once import made_once
from serving import Running, running
from small_bundles import small_pipeline


@pytest.fixture(scope="session")
def every_target() -> Path:
    """A whole small pipeline on every target of a CPU: 32 to 64 px, up to 2 images."""
    return made_once("engines", pipeline_bundle)


@pytest.fixture(scope="session")
def bundle(every_target: Path) -> Path:
    """The same on ONNX Runtime and OpenVINO alone."""
    return made_once("engines-of-two", lambda folder: without_slot(every_target, folder, "inductor"))


@pytest.fixture(scope="session")
def loras() -> Path:
    """A folder with the LoRA `style` of that pipeline."""

    def make(folder: Path) -> None:
        save_lora(small_pipeline(), folder, 1)
        (folder / "pytorch_lora_weights.safetensors").rename(folder / "style.safetensors")

    return made_once("serve-loras", make)


@pytest.fixture(scope="module")  # not longer: other tests look whether processes were left behind
def server(bundle: Path, loras: Path) -> Iterator[Running]:
    """A server of the bundle, called `small`, with ids `small` (OpenVINO) and `small:onnxruntime`, and the LoRA."""
    with running([f"small={bundle}"], lora_dir=loras) as found:
        yield found
