"""The onnxruntime builder where CUDA is meant: what it refuses, and what it takes out of the graph that is saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from graph_bundles import graph_bundle
from onnx import TensorProto, helper

from export import build_engine
from export.build import onnxruntime_graph as build_onnxruntime
from export.build.onnxruntime_graph import drop_copies
from sdkd.bundle.manifest import Bundle
from sdkd.errors import BuildError
from sdkd.targets.plan import plan_for_model


def test_a_graph_made_for_the_cpu_does_not_pass_for_one_made_for_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this package has CUDA")
    bundle = graph_bundle(tmp_path / "bundle")
    monkeypatch.setattr(build_onnxruntime, "runs_on_cuda", lambda: True)  # here, and not in the child that builds
    assert build_onnxruntime.flags("fp32", "fp32") == {"optimization": "extended", "provider": "cuda"}
    with pytest.raises(BuildError, match=r"was asked for CUDA and gave CPUExecutionProvider: libraries of CUDA"):
        build_engine(bundle, "onnxruntime", components=["unet"])
    assert Bundle.open(bundle.path).slots() == ()


def test_an_engine_is_built_again_where_cuda_began_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from export.build.request import rebuild_reasons, requests_for
    from sdkd.targets.registry import environment

    bundle = graph_bundle(tmp_path / "bundle")
    monkeypatch.setattr(build_onnxruntime, "runs_on_cuda", lambda: False)
    bundle = build_engine(bundle, "onnxruntime", components=["unet"])

    def reasons() -> list[str]:
        (request,) = requests_for(bundle, plan_for_model("onnxruntime"), None, ["unet"])
        return rebuild_reasons(bundle, request, environment("onnxruntime"))

    assert reasons() == []
    monkeypatch.setattr(build_onnxruntime, "runs_on_cuda", lambda: True)
    assert reasons() == ["built with provider cpu, asked for cuda"]


def with_copies() -> onnx.ModelProto:
    """(x + 1) * 2 and its square, as ONNX Runtime saves a graph of which some nodes run on another device."""
    nodes = [
        helper.make_node("MemcpyFromHost", ["x"], ["x_CUDA"]),
        helper.make_node("Add", ["x_CUDA", "one"], ["sum_CUDA"]),
        helper.make_node("MemcpyToHost", ["sum_CUDA"], ["sum"]),  # a graph's output, which a node reads, too
        helper.make_node("Mul", ["sum", "two"], ["double"]),
        helper.make_node("MemcpyFromHost", ["double"], ["double_CUDA"]),
        helper.make_node("MemcpyToHost", ["double_CUDA"], ["double_again"]),
        helper.make_node("Mul", ["double_again", "double_CUDA"], ["square"]),
    ]
    x, *outputs = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "sum", "double", "square")
    )
    weights = [helper.make_tensor(name, TensorProto.FLOAT, [1], [value]) for name, value in (("one", 1), ("two", 2))]
    return helper.make_model(
        helper.make_graph(nodes, "copies", [x], outputs, weights),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )


def test_copies_between_devices_leave_the_saved_graph(tmp_path: Path) -> None:
    model = with_copies()
    assert drop_copies(model) == 4
    assert [node.op_type for node in model.graph.node] == ["Add", "Mul", "Mul"]
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": np.array([1, 2], dtype=np.float32)})
    assert [array.tolist() for array in found] == [[2.0, 3.0], [4.0, 6.0], [16.0, 36.0]]
    assert drop_copies(model) == 0


def test_weights_beside_the_graph_stay_where_they_are(tmp_path: Path) -> None:
    model, file = with_copies(), tmp_path / "model.onnx"
    wide = np.ones(2, dtype=np.float32)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(wide, "one"))
    onnx.save(model, file, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    weights = (tmp_path / "model.onnx.data").read_bytes()
    build_onnxruntime._without_copies(file)
    assert (tmp_path / "model.onnx.data").read_bytes() == weights
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert session.run(["square"], {"x": wide})[0].tolist() == [16.0, 16.0]
