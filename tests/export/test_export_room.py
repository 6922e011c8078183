"""What an export takes is said, and refused, before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import export.room as room
from export import export_pipeline
from export.component import ExportOptions
from export.side_by_side import source_for
from sdkd.errors import ExportError
from sdkd.targets.plan import plan_for_model
from sdkd.workflow import prepare

UNET = 745_225_604  # Vega's parameters


@pytest.mark.parametrize(
    ("precision", "verify", "bytes_each"), [("fp32", True, 4), ("fp16", True, 4), ("fp16", False, 2)]
)
def test_the_estimate_follows_from_the_configs(precision: str, verify: bool, bytes_each: int) -> None:
    options = ExportOptions(precision, verify=verify)  # type: ignore[arg-type]
    found = room.estimate(source_for("random:vega", {}, options), ("unet", "vae_decoder"), options)
    assert found.largest == "unet"
    assert found.memory == room.BASE_BYTES + bytes_each * UNET
    assert found.disk == (4 if precision == "fp32" else 2) * (UNET + 49_490_199)


def test_too_little_memory_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_memory", lambda: 2_000_000_000)
    with pytest.raises(
        ExportError, match=r"the exports, unet most of all, need about 3.5 GB of memory, and 2.0 GB are free: "
    ):
        export_pipeline("random:vega", tmp_path / "bundle")
    assert not any(path.is_dir() for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("target", "advice"),
    [
        ("onnxruntime", "or build with --precision fp16, or export it with `sdkd export`, and build on a machine with"),
        ("openvino", "or export it with `sdkd export`, and build on a machine with more memory"),
    ],
)
def test_an_export_whose_engines_cannot_fit_is_refused_before_it(
    target: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "free_memory", lambda: 9_000_000_000)  # the export alone takes 3.5 GB
    words = "the builds, unet most of all, need about 9.2 GB of memory, and 9.0 GB are free: close other programs, "
    with pytest.raises(ExportError, match=re.escape(words + advice)):
        prepare("random:vega", plan_for_model(target), tmp_path / "made")
    assert not list(tmp_path.rglob("*.onnx*"))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_disk_holds_graphs_and_engines(precision: str) -> None:
    options, plan = ExportOptions("fp32"), plan_for_model("onnxruntime", precision)
    found = room.estimate(source_for("random:vega", {}, options), ("unet", "vae_decoder"), options, room.Engines(plan))
    assert found == room.Room(
        memory=300_000_000 + 3 * 4 * UNET,
        disk=(4 + (4 if precision == "fp32" else 1)) * (UNET + 49_490_199),
        largest="unet",
        building=True,
    )


def test_only_engines_that_are_built_count() -> None:
    options, plan, names = ExportOptions("fp32"), plan_for_model("onnxruntime"), ("unet", "vae_decoder")
    source = source_for("random:vega", {}, options)
    export = room.estimate(source, names, options)
    one = room.estimate(source, names, options, room.Engines(plan, ["vae_decoder"]))
    assert one == replace(export, disk=export.disk + 4 * 49_490_199)
    assert room.estimate(source, names, options, room.Engines(plan, ["controlnet"])) == export


def test_too_little_disk_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ExportError, match=r"graphs in '.*' need about 1.6 GB of disk space, and 0.0 MB are free"):
        export_pipeline("random:vega", tmp_path / "bundle", precision="fp16", components=("unet", "vae_decoder"))
