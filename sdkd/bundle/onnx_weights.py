"""Weights of an exported graph by their state-dict names: read, replaced, and checked not to lie outside its folder.

`initializers.json` beside a graph says how each weight is stored: `same`, or `transpose` of a matrix.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkd.core.files import read_json
from sdkd.errors import BundleError, ModelError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from onnx import ModelProto, TensorProto

TRANSFORMS_FILE = "initializers.json"
LARGEST_PROTOBUF = 2**31 - 1  # bytes of a graph in memory
SAME, TRANSPOSE = "same", "transpose"


def read_weights(onnx_file: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """A component's weights from its exported graph, under their state-dict names and in their state-dict shapes.

    Raises BundleError when the graph lacks one of the names.
    """
    wanted = list(names)
    transforms, arrays = transforms_of(onnx_file, wanted), exported_weights(onnx_file, wanted)
    return {name: arrays[name].T if transforms[name] == TRANSPOSE else arrays[name] for name in wanted}


def torch_weights(onnx_file: Path, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """What `read_weights` gives as torch tensors of their own memory, in the graph's dtypes; `names`: None for all."""
    import numpy as np

    wanted = weight_names(onnx_file) if names is None else names
    return {name: as_tensor(np.array(array, order="C")) for name, array in read_weights(onnx_file, wanted).items()}


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """A numpy array's own memory as a torch tensor; in bfloat16, too, which torch does not take from numpy."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)


def weight_names(onnx_file: Path) -> set[str]:
    """The weights that a graph keeps by their state-dict names."""
    return set(read_json(onnx_file.with_name(TRANSFORMS_FILE), dict[str, str]))


def transforms_of(onnx_file: Path, wanted: Iterable[str]) -> dict[str, str]:
    """How a graph stores its weights, by state-dict name; BundleError when it lacks one of the wanted."""
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

    transforms = transforms_of(onnx_file, weights)
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


def check_external_data(onnx_file: str | Path, listed: Collection[Path] | None = None, *, engine: bool = False) -> None:
    """BundleError unless all weights that an ONNX file keeps outside itself are in files of its own folder.

    `listed`: the files that it may use, those whose hashes were compared; None: any of the folder. Of an `engine` that
    is no graph, its library knows more to say.

    Refused are absolute locations, locations that go up or lead out through a link, files that are missing, and ranges
    beyond a file's end; also a file that is no ONNX graph. The weights are not read. A file without such weights is
    fine.
    """
    import onnx
    from google.protobuf.message import DecodeError

    path = Path(onnx_file)
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        if engine:
            return
        raise BundleError(f"ONNX graph {str(path)!r} cannot be read ({error}): export the model again") from error
    for tensor in _external(model):
        if problem := _problem(path, tensor, listed):
            raise BundleError(
                f"ONNX graph {str(path)!r} keeps its weight {tensor.name!r} {problem}: do not trust this bundle, or "
                "export the model again"
            )


def _external(message: Any) -> Iterator[Any]:
    """Every tensor with data outside the file, wherever in a model it is: in graphs within nodes, in functions, ..."""
    from google.protobuf.message import Message
    from onnx import TensorProto

    if isinstance(message, TensorProto):
        if message.data_location == TensorProto.EXTERNAL or message.external_data:
            yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in (value,) if isinstance(value, Message) else value:
                yield from _external(part)


def _problem(onnx_file: Path, tensor: Any, listed: Collection[Path] | None) -> str | None:
    """What is wrong with where a tensor's data lie; None when nothing is."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    folder = onnx_file.parent.resolve()
    shown = f"in {location!r}"
    if not location or "\0" in location or ".." in location.replace("\\", "/").split("/"):
        return f"{shown}, which is no file of its own folder"
    try:
        file = (folder / location).resolve()
        start, length = int(entries.get("offset") or 0), int(entries.get("length") or 0)
    except (OSError, RuntimeError, ValueError):  # a circle of links, a number that is none
        return f"{shown} with a damaged description"
    if not file.is_relative_to(folder):
        return f"{shown}, outside its own folder"
    if not file.is_file():
        return f"{shown}, which is missing"
    if listed is not None and file not in {path.resolve() for path in listed}:
        return f"{shown}, which the manifest does not list"
    if min(start, length) < 0 or start + length > file.stat().st_size:
        return f"{shown} from byte {start} to {start + length}, beyond the end of that file"
    return None
