"""Weights of an exported graph by their state-dict names: read them, and make a graph with others in their place.

`initializers.json` beside a graph says how each weight is stored: `same`, or `transpose` of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkd.core.files import read_json
from sdkd.errors import BundleError, ModelError

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto, TensorProto

TRANSFORMS_FILE = "initializers.json"
LARGEST_PROTOBUF = 2**31 - 1  # bytes of a graph in memory
SAME, TRANSPOSE = "same", "transpose"


def read_weights(onnx_file: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """A component's weights from its exported graph, under their state-dict names and in their state-dict shapes.

    Raises BundleError when the graph lacks one of the names.
    """
    wanted = list(names)
    transforms, arrays = _transforms(onnx_file, wanted), exported_weights(onnx_file, wanted)
    return {name: arrays[name].T if transforms[name] == TRANSPOSE else arrays[name] for name in wanted}


def _transforms(onnx_file: Path, wanted: Iterable[str]) -> dict[str, str]:
    transforms: dict[str, str] = read_json(onnx_file.parent / TRANSFORMS_FILE, dict[str, str])
    names = list(wanted)
    if missing := [name for name in names if name not in transforms]:
        raise BundleError(
            f"{str(onnx_file)!r} does not hold {len(missing)} of {len(names)} weights by name (first: {missing[0]}): "
            "export the model again"
        )
    return transforms


def stored_weights(onnx_file: Path, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights as the graph stores them: its dtypes, transposed where it has the transpose, contiguous.

    `weights`: by state-dict name, in state-dict shape, any float dtype. Raises BundleError for a name that the graph
    has not, ModelError for another shape.
    """
    import numpy as np
    import onnx

    transforms = _transforms(onnx_file, weights)
    tensors = {tensor.name: tensor for tensor in onnx.load(onnx_file, load_external_data=False).graph.initializer}
    found = {}
    for name, value in weights.items():
        array = value.T if transforms[name] == TRANSPOSE else value
        tensor = tensors[name]
        if tuple(tensor.dims) != array.shape:
            raise ModelError(
                f"weight {name!r} has shape {value.shape}, the graph's is stored as {tuple(tensor.dims)} "
                f"({transforms[name]}): give weights of the same architecture"
            )
        found[name] = np.ascontiguousarray(array.astype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)))
    return found


def exported_weights(onnx_file: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Weights as the graph stores them, by name."""
    import onnx
    from onnx import numpy_helper

    wanted, folder = set(names), str(onnx_file.parent)
    initializers = onnx.load(onnx_file, load_external_data=False).graph.initializer
    return {tensor.name: numpy_helper.to_array(tensor, folder) for tensor in initializers if tensor.name in wanted}


def replaced(onnx_file: Path, stored: Mapping[str, np.ndarray]) -> ModelProto:
    """The graph with other weights in it, as `stored_weights` gives them; those left alone stay where they are.

    Weights that lie beside the graph are still found by their relative names, from the graph's own folder.
    """
    import onnx

    model = onnx.load(onnx_file, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.name in stored:
            _replace(tensor, stored[tensor.name])
    return model


def save_whole(model: ModelProto, rest: Path, file: Path) -> None:
    """Write a graph of `replaced` and all its weights, those in the folder `rest`, too, to `file` and one beside it."""
    import onnx
    from onnx.external_data_helper import load_external_data_for_model

    load_external_data_for_model(model, str(rest))
    onnx.save(model, file, save_as_external_data=True, location=f"{file.name}.data", size_threshold=1024)


def _replace(tensor: TensorProto, array: np.ndarray) -> None:
    import onnx

    for field in ("external_data", "float_data", "int32_data", "double_data"):
        tensor.ClearField(field)
    tensor.data_location = onnx.TensorProto.DEFAULT
    tensor.raw_data = array.tobytes()


def state_arrays(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Torch tensors as float32 arrays."""
    return {name: tensor.detach().cpu().float().numpy() for name, tensor in state.items()}
