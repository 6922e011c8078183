"""What an engine is made of: its layers by type and precision, as the engine itself says.

An engine is native code: it is opened only after `check_engine` found it whole, unaltered and fit for this machine.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator

from engines.sessions.checks import Checked, check_engine
from sdkd.bundle.manifest import Bundle
from sdkd.targets.inductor import profile_name

Layer = tuple[str, str]
"""Type and precision of one layer."""
# How TensorRT's inspector names what a tensor is made of, within a description of its format.
FORMATS = (
    (r"\bbf16\b|bfloat16", "bf16"),
    (r"\bfp16\b|\bhalf\b", "fp16"),
    (r"\bfp32\b|\bfloat\b", "fp32"),
    (r"\bint64\b", "int64"),
    (r"\bint32\b", "int32"),
    (r"\bbool\b", "bool"),
)
# Of Inductor's C++: what a line calls.
CALLS = re.compile(
    r"^\s*(?:AOTI_TORCH_ERROR_CODE_CHECK\()?"
    r"(?:aoti_torch_(?:cpu|cuda)_(?P<operator>\w+)|(?:call_)?(?P<fused>cpp_fused|triton_[a-z]+)_\w+)\(",
    re.MULTILINE,
)
PLUMBING = ("Input", "Output", "Const", "Parameter", "Result", "Constant")  # of OpenVINO's run-time graph


def count_layers(bundle: Bundle, slot: str, component: str) -> list[tuple[str, str, int]]:
    """Type, precision and number of an engine's layers, the most frequent first.

    Raises what `check_engine` raises, above all EngineError where a GPU is needed and not there.
    """
    checked = check_engine(bundle, slot, component)
    counts = Counter(_READERS[checked.record.target](checked))
    return [(*layer, number) for layer, number in counts.most_common()]


def _onnxruntime(checked: Checked) -> Iterator[Layer]:
    """Nodes of the saved graph; precision as far as the graph says, carried on from inputs, weights and casts."""
    import onnx

    graph = onnx.load(checked.path, load_external_data=False).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info)}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        inputs = [kinds[name] for name in node.input if name in kinds]
        kind = next((one.i for one in node.attribute if node.op_type == "Cast" and one.name == "to"), None)
        kind = kind or kinds.get(node.output[0]) or next(iter(inputs), 0)
        kinds |= {name: kinds.get(name) or kind for name in node.output}
        yield node.op_type, _onnx_precision(kind)


def _onnx_precision(kind: int) -> str:
    import onnx

    name = onnx.TensorProto.DataType.Name(kind).lower()
    return {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "undefined": "unknown"}.get(name, name)


def _openvino(checked: Checked) -> Iterator[Layer]:
    """Nodes of the run-time graph, in the precision that this CPU computes them in."""
    from sdkd.targets.registry import openvino_core

    config = dict(checked.record.flags.get("config", {}))
    if checked.path.suffix == ".blob":
        model = openvino_core().import_model(checked.path.read_bytes(), "CPU", config)
    else:
        model = openvino_core().compile_model(openvino_core().read_model(checked.path), "CPU", config)
    names = {"f32": "fp32", "f16": "fp16"}
    for node in model.get_runtime_model().get_ops():
        facts = {key: _text(value) for key, value in node.get_rt_info().items()}
        if (kind := facts.get("layerType", node.get_type_name())) not in PLUMBING:
            precision = facts.get("runtimePrecision", "unknown")
            yield kind, names.get(precision, precision)


def _text(value: object) -> str:
    return str(value.astype(str) if hasattr(value, "astype") else value)


def _tensorrt(checked: Checked) -> Iterator[Layer]:
    from engines.sessions.trt.session import TensorRTSession

    session = TensorRTSession(checked)
    try:
        yield from read_inspector(session.layer_information())
    finally:
        session.close()


def read_inspector(text: str) -> Iterator[Layer]:
    """Layers of what TensorRT's EngineInspector says as JSON; names alone when the engine was built to say no more."""
    for layer in json.loads(text)["Layers"]:
        if isinstance(layer, str):
            yield "unknown", "unknown"
            continue
        outputs = layer.get("Outputs") or [{}]
        kind = layer.get("ParameterType") or layer.get("LayerType") or "unknown"
        yield str(kind), _format_precision(str(outputs[0].get("Format/Datatype", "")))


def _format_precision(text: str) -> str:
    return next((name for pattern, name in FORMATS if re.search(pattern, text, re.I)), "unknown")


def _inductor(checked: Checked) -> Iterator[Layer]:
    """Calls of the first profile's code, from the source beside it: library operators, and loops fused from several."""
    with zipfile.ZipFile(checked.path) as package:
        (source,) = (
            name for name in package.namelist() if f"/{profile_name(0)}/" in name and name.endswith(".wrapper.cpp")
        )
        code = package.read(source).decode()
    for call in CALLS.finditer(code):
        yield call["fused"] or call["operator"].removesuffix("_out"), checked.record.precision


_READERS: dict[str, Callable[[Checked], Iterator[Layer]]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "tensorrt": _tensorrt,
    "tensorrt-rtx": _tensorrt,
    "inductor": _inductor,
}
