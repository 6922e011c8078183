"""Bundles that the engine tests share: built once, never changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from engine_bundles import graph_unet, pipeline_bundle
from small_bundles import small_pipeline

from sdkd.bundle import Bundle


@pytest.fixture
def eager() -> StableDiffusionPipeline:
    """An eager pipeline: the one that `engine_bundle` was exported from."""
    return small_pipeline()


@pytest.fixture(scope="session")
def engine_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline on ONNX Runtime and OpenVINO: 32 to 64 px, up to 2 images."""
    return pipeline_bundle(tmp_path_factory.mktemp("engines") / "bundle")


@pytest.fixture
def bundle_copy(engine_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(engine_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A hand-written UNet on both CPU targets: 32 to 64 px, up to 2 images."""
    return graph_unet(tmp_path_factory.mktemp("graph") / "bundle")


@pytest.fixture
def graph_copy(graph: Bundle, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(graph.path, tmp_path / "bundle"))
