"""ONNX files of others: their weights may not lie outside the folder that they came in."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from sdkd.errors import BundleError


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
