"""A small bundle with engines of eight bits for both CPU targets, made once per test run."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

from made_once import made_once
from small_exports import bundle_copy

from export import build_engine
from export.build.calibrate import CalibrationWish
from sdkd.bundle.manifest import Bundle

CPU_TARGETS = ("onnxruntime", "openvino")
WISH = CalibrationWish(prompts=("a red star", "a blue cross"), images=3, steps=3)


def _make(path: Path) -> None:
    bundle_copy(path)
    for target in CPU_TARGETS:
        build_engine(path, target, precision="int8", calibration=WISH, keep_slower=True)


@cache
def rounded_bundle() -> Bundle:
    """With `onnxruntime-int8` and `openvino-int8`, slow as they may be; read it, do not change it."""
    return Bundle.open(made_once("rounded", _make))


def rounded_copy(folder: Path) -> Bundle:
    """A bundle of one's own."""
    shutil.copytree(rounded_bundle().path, folder)
    return Bundle.open(folder)
