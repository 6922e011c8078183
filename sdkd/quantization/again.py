"""The rounding of an engine done again on other weights: of a LoRA, or of another checkpoint of the architecture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sdkd.bundle.manifest import Bundle, EngineRecord
from sdkd.bundle.onnx_weights import TRANSFORMS_FILE, TRANSPOSE
from sdkd.bundle.quantized import CALIBRATION_FILE
from sdkd.core.files import read_json
from sdkd.errors import BundleError
from sdkd.quantization.scheme import LayerScales, Scheme

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto

QUANTIZATION, CALIBRATION = (
    "quantization",
    "calibration",
)  # of a record's flags: the scheme, and in it the calibration's digest


def round_again(bundle: Bundle, record: EngineRecord, model: ModelProto, folder: Path) -> None:
    """Round a graph in place as an engine's was, with scales for the weights that it has now; a float engine's stays.

    `folder`: of the exported graph, where weights that were not replaced lie. The activations' ranges are the
    calibration's, of the bundle's own weights. Raises BundleError where the calibration is missing or was recorded
    again.
    """
    if QUANTIZATION not in record.flags:
        return
    from sdkd.quantization.graph import quantize_graph

    known = record.flags[QUANTIZATION]
    scheme = Scheme(**known["scheme"])
    weights = layer_weights(model, folder)
    if CALIBRATION not in known:
        scales = {name: LayerScales(1.0) for name in weights}
    else:
        scales = _scales(bundle, record, scheme, weights)
    quantize_graph(model, folder, scales, scheme)


def _scales(
    bundle: Bundle, record: EngineRecord, scheme: Scheme, weights: Mapping[str, np.ndarray]
) -> dict[str, LayerScales]:
    from sdkd.quantization.calibration import Calibration
    from sdkd.quantization.scales import layer_scales

    file = bundle.path / CALIBRATION_FILE
    calibration = Calibration.load(file)
    if calibration.digest != record.flags[QUANTIZATION][CALIBRATION]:
        raise BundleError(
            f"calibration {str(file)!r} was recorded again after the {record.slot} engine was built: build it again: "
            f"{bundle.repair(record)}"
        )
    kept = record.flags.get("float_layers", {})
    found = layer_scales(calibration, scheme, {name: weights[name] for name in weights if name in calibration.layers})
    return {name: scales for name, scales in found.items() if name not in kept}


def layer_weights(model: ModelProto, folder: Path) -> dict[str, np.ndarray]:
    """Float32 weights of a graph's linear layers and convolutions, in state-dict shape, by layer.

    Weights outside of the graph are read from `folder`, whose `initializers.json` says how they are stored.
    """
    import numpy as np
    from onnx import numpy_helper

    transforms = read_json(folder / TRANSFORMS_FILE, dict[str, str])
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    names = [node.input[1] for node in model.graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    found = {}
    for name in (name for name in names if name in transforms and name.endswith(".weight")):
        array = numpy_helper.to_array(tensors[name], str(folder)).astype(np.float32)
        found[name.removesuffix(".weight")] = array.T if transforms[name] == TRANSPOSE else array
    return found
