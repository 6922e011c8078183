"""Models and a bundle for the tests of comparisons, made once per test run."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from functools import cache
from pathlib import Path

from helpers import fixed_weights
from small_bundles import small_bundle, small_pipeline

from export.build import build_engine
from sdkd.bundle import Bundle
from sdkd.profiles import Range, ShapeRanges


@cache
def engine_models() -> Path:
    """Pipelines of 32 px, `right` and `wrong` (another UNet), and `bundle`: ONNX Runtime engines of `right`."""
    folder = Path(tempfile.mkdtemp(prefix="sdkd-test-compare-"))
    pipe = small_pipeline()
    pipe.save_pretrained(folder / "right")
    bundle = small_bundle(folder / "bundle")
    pipe.save_config(bundle.path)
    for part in ("tokenizer", "scheduler"):
        getattr(pipe, part).save_pretrained(bundle.path / part)
    source = {"model": str(folder / "right")}
    Bundle(bundle.path, dataclasses.replace(bundle.manifest, source=source)).save()
    one = ShapeRanges(Range(1, 1, 1), Range.fixed(32), Range.fixed(32), Range.fixed(77))
    build_engine(bundle.path, "onnxruntime", ranges=one)
    pipe.unet = fixed_weights(copy.deepcopy(pipe.unet), seed=7)
    pipe.save_pretrained(folder / "wrong")
    return folder
