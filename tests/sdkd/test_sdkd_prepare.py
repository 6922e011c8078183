"""What `prepare` exports: for the library of its target, and again where an earlier export is none for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_exports import small_pipeline

from export.build import engines as build
from export.graph import to_onnx
from sdkd.bundle.manifest import Bundle
from sdkd.targets.plan import plan_for_model
from sdkd.workflow import prepare


def test_the_export_is_one_that_the_target_s_library_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_pipeline().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(build, "build_engine", lambda *_, **__: None)  # of another test
    exported, plan = [], plan_for_model("onnxruntime")
    for old in (False, True, True, False):  # a library without attention of its own parses no later opset than 18
        monkeypatch.setattr(to_onnx, "_is_old", lambda target, old=old: old and target == "onnxruntime")
        made = prepare(tmp_path / "model", plan, tmp_path / "work", components=("text_encoder",))
        exported.append((Bundle.open(made.bundle).component("text_encoder").opset, made.exported))
    assert exported == [(23, True), (18, True), (18, False), (18, False)]
