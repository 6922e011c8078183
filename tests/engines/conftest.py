"""Bundles that the engine tests share: built once, never changed."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from engine_bundles import graph_unet, pipeline_bundle, variant_engines
from made_once import made_once
from small_bundles import small_pipeline

from sdkd.bundle.manifest import Bundle


@pytest.fixture
def eager() -> StableDiffusionPipeline:
    """A copy of the eager pipeline that `engine_bundle` was exported from, which a test may change."""
    return copy.deepcopy(small_pipeline())


@pytest.fixture(scope="session")
def engine_bundle() -> Path:
    """A whole pipeline on every target of a CPU: 32 to 64 px, up to 2 images."""
    return made_once("engines", pipeline_bundle)


@pytest.fixture(scope="session")
def folder() -> Path:
    """The small pipeline as a diffusers folder."""
    return made_once("folder", lambda path: small_pipeline().save_pretrained(path))


@pytest.fixture(scope="session")
def control_bundle() -> Path:
    """A ControlNet pipeline, with all hidden states, on both CPU targets: `variant_engines`."""
    return variant_engines("controlnet")


@pytest.fixture
def bundle_copy(engine_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(engine_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def graph() -> Bundle:
    """A hand-written UNet on every target of a CPU: 32 to 64 px, up to 2 images."""
    return Bundle.open(made_once("graph-unet", graph_unet))


@pytest.fixture
def graph_copy(graph: Bundle, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(graph.path, tmp_path / "bundle"))
