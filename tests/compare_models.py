"""Models and a bundle for the tests of comparisons, made once per test run."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

from helpers import fixed_weights
from made_once import made_once, shared_root
from small_exports import bundle_copy, small_pipeline

from export.build.engines import build_engine
from sdkd.bundle.manifest import Bundle
from sdkd.core.profiles import Range, ShapeRanges


@cache
def engine_models() -> Path:
    """Pipelines of 32 px, `right` and `wrong` (another UNet), and `bundle`: ONNX Runtime engines of `right`."""
    return made_once("compare", _write_models)


def _write_models(folder: Path) -> None:
    pipe = small_pipeline()
    pipe.save_pretrained(folder / "right")
    bundle = bundle_copy(folder / "bundle")
    source = {"model": str(shared_root() / "compare" / "right")}  # where it will lie
    Bundle(bundle.path, dataclasses.replace(bundle.manifest, source=source)).save()
    one = ShapeRanges(Range(1, 1, 1), Range.fixed(32), Range.fixed(32), Range.fixed(77))
    build_engine(bundle.path, "onnxruntime", ranges=one)
    fixed_weights(pipe.unet, seed=7)
    pipe.save_pretrained(folder / "wrong")
