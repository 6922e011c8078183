"""Bad input, one clear message each: operators that a library does not take, and machines that lack something."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from graph_bundles import ending, graph_bundle
from onnx import helper
from small_exports import bundle_copy

from export import build_engine
from export.build.engines import OTHER_ADVICE, advice_for, explain
from sdkd.bundle.manifest import FileRecord
from sdkd.core.child import ChildError
from sdkd.errors import BuildError
from sdkd.targets.registry import TARGETS, availability

RTX = "tensorrt-rtx"
HALF = r"Try this: an operator takes no half precision here: export the model with --precision fp32"


@pytest.mark.parametrize(
    ("target", "operator", "message"),
    [
        (
            "onnxruntime",
            "Celu",
            rf"Type 'tensor\(float16\)' of input parameter \(before\) of operator \(Celu\).*{HALF}",
        ),
        ("openvino", "Celu", rf"Celu-18 with a message:.*do not have the same element type \(arg0 .* f16.*{HALF}"),
        ("openvino", "Det", r".*Det.*Try this: update the"),
    ],
)
def test_an_operator_that_a_library_does_not_have(tmp_path: Path, target: str, operator: str, message: str) -> None:
    pytest.importorskip(TARGETS[target].module)
    bundle = ending(graph_bundle(tmp_path / "bundle", "fp16"), operator, name="conv_out/Last")
    with pytest.raises(BuildError, match=rf"(?s)unet could not be built for {target}: .*{message}"):
        build_engine(bundle, target, components=["unet"])
    assert not (bundle.path / "engines").exists()


def test_a_refused_node_is_named_by_its_module(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = bundle_copy(tmp_path / "bundle")
    record = bundle.component("unet")
    path = bundle.path / record.files[0].path
    model = onnx.load(path, load_external_data=False)
    node = next(
        node for node in model.graph.node if node.op_type == "GroupNormalization" and ".attentions.0" in node.name
    )
    node.op_type, node.domain = "Squash", "my.own"
    model.opset_import.append(helper.make_opsetid("my.own", 1))
    path.write_bytes(model.SerializeToString())
    files = (FileRecord.of(bundle.path, path), *record.files[1:])
    changed = {**bundle.manifest.components, "unet": replace(record, files=files)}
    replace(bundle, manifest=replace(bundle.manifest, components=changed)).save()
    with pytest.raises(
        BuildError,
        match=r"(?s)^unet could not be built for tensorrt-rtx: .*with name: down_blocks\.0\.attentions\.0\.norm/\w+ "
        r"and operator: Squash .*Plugin not found.*\nTry this: update the target's package, or export the model again "
        r"with an older --opset$",
    ):
        build_engine(bundle.path, RTX, precision="fp32", components=["unet"])
    assert not (bundle.path / "engines").exists()


def test_the_gpu_is_not_to_blame_where_none_is_needed() -> None:
    noise = (
        "[E] [checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (... cudaError 35: CUDA driver version"
    )
    error = ChildError("PolygraphyException: Invalid Engine", (noise, "[E] Error Code 4: Shapes"))
    told = explain("unet", RTX, error)
    assert "catchCudaError" not in told
    assert told.endswith("Error Code 4: Shapes\nTry this: " + OTHER_ADVICE)
    assert "Try this: build on a machine with an NVIDIA GPU" in explain("unet", "tensorrt", error)
    assert advice_for("std::bad_alloc").startswith("close other programs")


# Machines


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB, or skip where this user may not make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_no_space(small_disk: Path) -> None:
    bundle = graph_bundle(small_disk / "bundle")
    (small_disk / "fill").write_bytes(os.urandom(max(os.statvfs(small_disk).f_bavail * 4096 - 8192, 0)))
    before = sorted(path for path in small_disk.rglob("*") if path.name != ".bundle.lock")
    with pytest.raises(
        BuildError, match=r"engines in '.*bundle' need about 0\.\d MB of disk space, and 0\.0 MB are free"
    ):
        build_engine(bundle, "onnxruntime")
    assert sorted(path for path in small_disk.rglob("*") if path.name != ".bundle.lock") == before


def test_a_disk_that_is_full_after_all(small_disk: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = graph_bundle(small_disk / "bundle", "fp16")
    before = sorted(path for path in small_disk.rglob("*") if path.name != ".bundle.lock")
    with pytest.raises(
        BuildError, match=r"^no space left for the engines in .* free\): nothing was changed\. Free some"
    ):
        build_engine(bundle, RTX)  # its plans are larger than these weights
    assert sorted(path for path in small_disk.rglob("*") if path.name != ".bundle.lock") == before


@pytest.mark.skipif(availability("tensorrt").can_run, reason="tensorrt runs here")
def test_no_gpu_where_one_is_needed(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt")
    with pytest.raises(BuildError, match=r"target 'tensorrt' cannot be built here: .*\. To do: .*driver"):
        build_engine(graph_bundle(tmp_path / "bundle", "fp16"), "tensorrt")
