"""External data of an ONNX file must stay in its folder, wherever in the graph they are named."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sdkd.bundle.onnx_weights import check_external_data
from sdkd.errors import BundleError

VALUES = np.arange(4, dtype=np.float32)


def stored(name: str, **entries: Any) -> TensorProto:
    """A tensor of 16 bytes whose data are outside the graph."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def identity(name: str) -> onnx.NodeProto:
    return helper.make_node("Identity", [name], ["y"])


def graph_of(nodes: list[onnx.NodeProto], initializers: list[TensorProto]) -> onnx.GraphProto:
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    return helper.make_graph(nodes, "g", [], [output], initializers)


def as_initializer(tensor: TensorProto) -> onnx.ModelProto:
    return helper.make_model(graph_of([identity(tensor.name)], [numpy_helper.from_array(VALUES, "own"), tensor]))


def as_constant(tensor: TensorProto) -> onnx.ModelProto:
    return helper.make_model(graph_of([helper.make_node("Constant", [], ["y"], value=tensor)], []))


def in_a_branch(tensor: TensorProto) -> onnx.ModelProto:
    branch = graph_of([identity(tensor.name)], [tensor])
    node = helper.make_node("If", ["condition"], ["y"], then_branch=branch, else_branch=branch)
    condition = numpy_helper.from_array(np.array(True), "condition")
    return helper.make_model(graph_of([node], [condition]))


def in_a_function(tensor: TensorProto) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", 18)]
    body = [helper.make_node("Constant", [], ["y"], value=tensor)]
    function = helper.make_function("own", "F", [], ["y"], body, opsets)
    node = helper.make_node("F", [], ["y"], domain="own")
    return helper.make_model(graph_of([node], []), functions=[function])


PLACES = (as_initializer, as_constant, in_a_branch, in_a_function)


def saved(folder: Path, model: onnx.ModelProto) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def test_data_of_the_own_folder_are_fine(tmp_path: Path) -> None:
    (tmp_path / "model.onnx.data").write_bytes(b"\0" * 4 + VALUES.tobytes())
    for place in PLACES:
        check_external_data(saved(tmp_path, place(stored("w", location="model.onnx.data", offset=4, length=16))))
    check_external_data(saved(tmp_path, as_initializer(numpy_helper.from_array(VALUES, "w"))))


def test_data_elsewhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(VALUES.tobytes())
    folder = tmp_path / "unet"
    folder.mkdir()
    (folder / "out").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    locations = ("../secret", "/etc/passwd", "x/../../secret", "..\\secret", "out/secret", "loop", "")
    message = r"model.onnx' keeps its weight 'w' in '.*: do not trust this bundle, or export"
    for place, location in itertools.product(PLACES, locations):
        file = saved(folder, place(stored("w", location=location)))
        with pytest.raises(BundleError, match=message):
            check_external_data(file)


def test_data_that_are_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(VALUES.tobytes())
    cases: list[tuple[dict[str, Any], str]] = [
        ({"location": "gone"}, "in 'gone', which is missing"),
        ({"location": "data", "offset": 8, "length": 16}, "from byte 8 to 24, beyond the end of that file"),
        ({"location": "data", "offset": -8}, "from byte -8 to -8, beyond the end of that file"),
        ({"location": "data", "length": "many"}, "in 'data' with a damaged description"),
        ({"location": "a\0b"}, "which is no file of its own folder"),
        ({}, "in '', which is no file of its own folder"),
    ]
    for entries, problem in cases:
        with pytest.raises(BundleError, match=problem):
            check_external_data(saved(tmp_path, as_initializer(stored("w", **entries))))
    (tmp_path / "garbage.onnx").write_bytes(b"\xff" * 100)
    for name in ("garbage", "gone"):
        with pytest.raises(BundleError, match=rf"graph '.*{name}.onnx' cannot be read \(.*\): export the model again"):
            check_external_data(tmp_path / f"{name}.onnx")
