"""Bundles that the engine tests share: built once, never changed."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import small_exports
from diffusers import StableDiffusionPipeline
from engine_bundles import TARGETS, graph_unet, pipeline_bundle, variant_engines
from made_once import made_once
from small_bundles import small_pipeline

from export import build_engine
from sdkd.bundle.manifest import Bundle
from sdkd.core.profiles import Range, ShapeRanges

EXPORTED_RANGES = ShapeRanges(Range(1, 1, 2), Range.fixed(32), Range.fixed(32), Range.fixed(77))


@pytest.fixture
def eager() -> StableDiffusionPipeline:
    """A copy of the eager pipeline that `engine_bundle` was exported from, which a test may change."""
    return copy.deepcopy(small_pipeline())


@pytest.fixture(scope="session")
def engine_bundle() -> Path:
    """A whole pipeline on ONNX Runtime and OpenVINO: 32 to 64 px, up to 2 images."""
    return made_once("engines", pipeline_bundle)


def _build_exported(folder: Path) -> None:
    bundle = small_exports.bundle_copy(folder)
    for target in TARGETS:
        bundle = build_engine(bundle, target, ranges=EXPORTED_RANGES)


@pytest.fixture(scope="session")
def exported_bundle() -> Path:
    """The small pipeline as the exporter writes it, on both CPU targets: 32 px, up to 2 images. Weights can change."""
    return made_once("exported-engines", _build_exported)


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
    """A hand-written UNet on both CPU targets: 32 to 64 px, up to 2 images."""
    return Bundle.open(made_once("graph-unet", graph_unet))


@pytest.fixture
def graph_copy(graph: Bundle, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(graph.path, tmp_path / "bundle"))
