"""Q/DQ nodes in an exported graph, from which OpenVINO, ONNX Runtime and TensorRT take their 8-bit kernels.

A rounded layer reads DequantizeLinear(QuantizeLinear(input)) and DequantizeLinear(8-bit weight). Tensors made here are
named after their layer: `<layer>.weight_int8`, `<layer>.input_scale`. Found with onnxruntime 1.32: it fuses a MatMul
only when every reader of an input has a DequantizeLinear of its own, and a Conv only when what it gives and its bias
are rounded, too. OpenVINO 2026.4 multiplies by its scale twice what a Conv without a bias gives, where batch or size is
not fixed and several nodes read it, such as a sum and a norm; a bias of zeros it takes out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from sdkd.core.files import write_bytes, written
from sdkd.errors import BundleError
from sdkd.quantization.scales import weight_codes
from sdkd.quantization.scheme import LayerScales, Scheme

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

WEIGHTED = ("Conv", "MatMul", "Gemm")
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
NEW_OPSET = 19  # of Q/DQ nodes that take E4M3 and half-precision scales
LARGEST_BIAS = 2**30  # code of a bias: half of what int32 holds, since products are added to it
SMALL_BYTES = 1024  # tensors below this stay in the graph's own file
ALIGNMENT = 64  # bytes: libraries map the file of weights, and read the numbers in place
KINDS = {"UINT8": "int8", "INT8": "int8", "FLOAT8E4M3FN": "fp8", "FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}


def quantize_graph(
    model: ModelProto, folder: Path, scales: Mapping[str, LayerScales], scheme: Scheme
) -> tuple[str, ...]:
    """Round the layers of `scales` in a graph, in place; returns them in the graph's order.

    `folder`: where weights outside of the graph lie. They are read layer by layer; those of other layers stay where
    they are, and float weights that nobody reads any more go. Raises BundleError for a layer whose weight the graph has
    not by name, and for a graph that cannot hold what the scheme wants.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    layers = [_layer(node, weights) for node in model.graph.node]
    if missing := [layer for layer in scales if layer not in layers]:
        raise BundleError(
            f"the graph does not hold {len(missing)} of {len(scales)} layers by name (first: {missing[0]!r}): export "
            "the model again"
        )
    writer = _Writer(model, folder, scheme)
    for node, layer in zip(model.graph.node, layers, strict=True):
        if layer is None or layer not in scales:
            writer.nodes.append(node)
        else:
            writer.round(node, layer, scales[layer])
    rounded = tuple(dict.fromkeys(layer for layer in layers if layer is not None and layer in scales))
    del model.graph.node[:]
    model.graph.node.extend(writer.nodes)
    _drop_unread(model.graph, {f"{layer}.{part}" for layer in rounded for part in ("weight", "bias")})
    return rounded


def save_quantized(model: ModelProto, folder: Path, file: Path) -> None:
    """Write a graph to `file` and all its weights to one file beside it: new ones, and old ones out of `folder`.

    One weight at a time, so that neither memory nor protobuf's 2 GB are a limit. The model then refers to the new file.
    """
    beside = file.with_name(f"{file.name}.data")
    with written(beside) as stream:
        for tensor in model.graph.initializer:
            _put_beside(tensor, folder, stream, beside.name)
    write_bytes(file, model.SerializeToString())


def _put_beside(tensor: TensorProto, folder: Path, stream: IO[bytes], location: str) -> None:
    from onnx import TensorProto
    from onnx.external_data_helper import load_external_data_for_tensor

    whole = tensor
    if tensor.data_location == TensorProto.EXTERNAL:
        whole = TensorProto()
        whole.CopyFrom(tensor)
        load_external_data_for_tensor(whole, str(folder))
    data = whole.raw_data
    tensor.ClearField("external_data")
    if len(data) < SMALL_BYTES:  # or kept in another field, as small constants are
        tensor.data_location = TensorProto.DEFAULT
        if data:
            tensor.raw_data = data
        return
    stream.write(bytes(-stream.tell() % ALIGNMENT))
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", stream.tell()), ("length", len(data))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    stream.write(data)


def layer_kinds(model: ModelProto) -> dict[str, str]:
    """What each layer of a graph multiplies in, in the graph's order: `int8`, `fp8`, or `fp32`, `fp16`, `bf16`.

    `int8 weights`: a float layer whose weight is stored in eight bits.
    """
    from onnx import TensorProto

    types = {tensor.name: TensorProto.DataType.Name(tensor.data_type) for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node if node.op_type == DEQUANTIZE for name in node.output}
    found = {}
    for node in model.graph.node:
        if node.op_type not in WEIGHTED or len(node.input) < 2:
            continue
        stored = makers[node.input[1]].input[0] if node.input[1] in makers else node.input[1]
        layer, _, part = stored.rpartition(".")
        if stored not in types or not part.startswith("weight"):
            continue
        whole = stored == node.input[1] or node.input[0] in makers
        found[layer] = KINDS[types[stored]] + ("" if whole else " weights")
    return found


def _layer(node: NodeProto, weights: set[str]) -> str | None:
    """The layer that a node computes, None for one without a weight of its own."""
    if node.op_type not in WEIGHTED or len(node.input) < 2 or node.input[1] not in weights:
        return None
    layer = str(node.input[1]).removesuffix(".weight")
    return layer if layer != node.input[1] else None


def _drop_unread(graph: GraphProto, names: set[str]) -> None:
    """Take initializers of these names out of a graph where nothing reads them."""
    unread = names - _read(graph) - {value.name for value in graph.output}
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name in unread:
            del graph.initializer[index]


def _read(graph: GraphProto) -> set[str]:
    """Names that nodes read, also those of graphs within nodes."""
    found = {name for node in graph.node for name in node.input}
    inner = [part.g for node in graph.node for part in node.attribute if part.HasField("g")]
    return found.union(*map(_read, inner))


class _Writer:
    """Makes the nodes around the layers of one graph, in order, and adds their constants to it."""

    def __init__(self, model: ModelProto, folder: Path, scheme: Scheme) -> None:
        self.graph, self.folder, self.scheme = model.graph, folder, scheme
        self.nodes: list[NodeProto] = []
        self.opset = next(one.version for one in model.opset_import if not one.domain)
        self.floats = {tensor.name: tensor for tensor in model.graph.initializer}
        self.taken = set(self.floats) | {value.name for value in model.graph.input}
        self.taken |= {name for node in model.graph.node for name in (node.name, *node.output)}
        self.shared: dict[tuple[Any, ...], list[str]] = {}  # what several layers, or several calls of one, read
        self.weight_scales: dict[str, np.ndarray] = {}
        self.suffix = "e4m3" if scheme.activations == "e4m3" else "int8"

    def round(self, node: NodeProto, layer: str, scales: LayerScales) -> None:
        """Add a layer's node, whose name stays, between those that round what it reads and gives."""
        dtype, bias = self._dtype(layer), None
        convolution = node.op_type == "Conv"
        axis = 0 if convolution or any(one.name == "transB" and one.i for one in node.attribute) else 1
        if self.scheme.outputs and convolution and len(node.input) > 2 and node.input[2] in self.floats:
            bias = self._array(node.input[2])
        elif self.scheme.activations == "u8" and convolution and not self.scheme.outputs:  # as OpenVINO takes it
            self._keep_bias(node, layer, dtype)
        if self.scheme.activations != "none":
            codes = self._input(node.input[0], layer, scales, dtype, convolution)
            node.input[0] = self._node(DEQUANTIZE, codes, f"{layer}.input")
        codes = self._weight(layer, scales, axis, bias, dtype)
        node.input[1] = self._node(DEQUANTIZE, codes, f"{layer}.weight", axis=axis)
        if bias is not None:
            node.input[2] = self._node(DEQUANTIZE, self._bias(layer, bias, scales), f"{layer}.bias", axis=0)
        self.nodes.append(node)
        if self.scheme.outputs and convolution:
            self._output(node, layer, scales, dtype)

    def _keep_bias(self, node: NodeProto, layer: str, dtype: np.dtype[Any]) -> None:
        """Give a convolution without a bias, or with zeros, one that is too small to change anything."""
        name = node.input[2] if len(node.input) > 2 else ""
        if name and (name not in self.floats or self._array(name).any()):
            return
        channels = self.floats[f"{layer}.weight"].dims[0]
        node.input[2:] = [self._constant(f"{layer}.bias_least", np.full(channels, _least(dtype), dtype))]

    def _dtype(self, layer: str) -> np.dtype[Any]:
        """Of a layer's floats and scales; BundleError where they do not go with the scheme."""
        from onnx import helper

        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(self.floats[f"{layer}.weight"].data_type))
        half, e4m3 = dtype != np.float32, self.scheme.activations == "e4m3"
        if (half or e4m3) and self.opset < NEW_OPSET:
            what = "E4M3 needs" if e4m3 else f"scales in {dtype} need"
            raise BundleError(
                f"the graph is of opset {self.opset}, and {what} opset {NEW_OPSET} or later: export the model again "
                "with --opset 23"
            )
        if half and self.scheme.outputs:
            raise BundleError(
                f"layer {layer!r} computes in {dtype}, and what convolutions give is rounded in float32 graphs alone: "
                "export the model again with --precision fp32"
            )
        return dtype

    def _input(
        self, name: str, layer: str, scales: LayerScales, dtype: np.dtype[Any], convolution: bool
    ) -> list[str]:  # fmt: skip
        """Codes, scale and zero point of what a layer reads, made once for all that round the tensor alike."""
        base = f"{layer}.input"
        if scales.smooth is not None:
            key: tuple[Any, ...] = (name, convolution, scales.smooth.tobytes())
            if key not in self.shared:
                factors = (1 / scales.smooth.astype(np.float64)).astype(dtype)
                factors = factors.reshape(-1, 1, 1) if convolution else factors
                inputs = [name, self._constant(f"{base}_smoothing", factors)]
                self.shared[key] = [self._node("Mul", inputs, base, output=f"{base}_smoothed")]
            (name,) = self.shared[key]
        key = (name, scales.scale, scales.zero_point)
        if key not in self.shared:
            self.shared[key] = self._quantize(name, base, scales.scale, scales.zero_point, dtype)
        return self.shared[key]

    def _output(self, node: NodeProto, layer: str, scales: LayerScales, dtype: np.dtype[Any]) -> None:
        """Round what a convolution gives, under the name that its readers know."""
        if scales.out_scale is None:
            raise BundleError(f"the scales of layer {layer!r} say nothing of what it gives: calibrate again")
        base, known = f"{layer}.output", node.output[0]
        node.output[0] = self._fresh(f"{base}_float")
        codes = self._quantize(node.output[0], base, scales.out_scale, scales.out_zero_point, dtype)
        self._node(DEQUANTIZE, codes, base)
        self.nodes[-1].output[0] = known

    def _quantize(self, name: str, base: str, scale: float, zero_point: int, dtype: np.dtype[Any]) -> list[str]:
        """Codes of a tensor, their scale, and their zero point, whose type is theirs."""
        import ml_dtypes

        types: dict[str, Any] = {"u8": np.uint8, "s8": np.int8, "e4m3": ml_dtypes.float8_e4m3fn}
        stored = np.maximum(np.float32(scale), _least(dtype)).astype(dtype)
        zero = np.array(zero_point).astype(types[self.scheme.activations])
        parts = [self._constant(f"{base}_scale", stored), self._constant(f"{base}_zero_point", zero)]
        return [self._node(QUANTIZE, [name, *parts], base, output=f"{base}_{self.suffix}"), *parts]

    def _weight(
        self, layer: str, scales: LayerScales, axis: int, bias: np.ndarray | None, dtype: np.dtype[Any]
    ) -> list[str]:  # fmt: skip
        """Codes of a layer's weight as the graph stores it, and their scales, one per output channel along `axis`."""
        import ml_dtypes

        base = f"{layer}.weight"
        if (base,) not in self.shared:
            stored = self._array(base)
            least = np.full(stored.shape[axis], _least(dtype), np.float32)
            if bias is not None:
                least = np.maximum(least, np.abs(bias) / np.float32(LARGEST_BIAS * scales.scale))
            codes, scale = weight_codes(stored if axis == 0 else stored.T, scales, self.scheme, least)
            codes = codes.astype(ml_dtypes.float8_e4m3fn if self.scheme.activations == "e4m3" else np.int8)
            codes = codes if axis == 0 else codes.T
            self.weight_scales[layer] = scale
            names = [
                self._constant(f"{base}_{self.suffix}", codes),
                self._constant(f"{base}_scale", scale.astype(dtype)),
            ]
            self.shared[base,] = names
        return self.shared[base,]

    def _bias(self, layer: str, bias: np.ndarray, scales: LayerScales) -> list[str]:
        """A convolution's bias in int32, and its scales, which are those of the products."""
        base = f"{layer}.bias"
        if (base,) not in self.shared:
            scale = np.float32(scales.scale) * self.weight_scales[layer]
            codes = np.rint(bias / scale.astype(np.float64)).clip(-LARGEST_BIAS, LARGEST_BIAS).astype(np.int32)
            self.shared[base,] = [self._constant(f"{base}_int32", codes), self._constant(f"{base}_scale", scale)]
        return self.shared[base,]

    def _array(self, name: str) -> np.ndarray:
        """An initializer's values, float32."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.floats[name], str(self.folder)).astype(np.float32)

    def _constant(self, name: str, array: np.ndarray) -> str:
        """Add an initializer; returns its name."""
        from onnx import helper

        tensor = self.graph.initializer.add()
        tensor.name, tensor.data_type = self._fresh(name), helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor.dims.extend(array.shape)
        tensor.raw_data = array.tobytes()  # in C order, however it lies in memory
        return str(tensor.name)

    def _node(self, kind: str, inputs: list[str], base: str, output: str | None = None, **attributes: int) -> str:
        """Add a node that computes one tensor; returns the tensor's name."""
        from onnx import helper

        outputs = [self._fresh(output or f"{base}_rounded")]
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=self._fresh(f"{base}/{kind}"), **attributes))
        return outputs[0]

    def _fresh(self, name: str) -> str:
        """A name that nothing in the graph has."""
        found, count = name, 1
        while found in self.taken:
            count += 1
            found = f"{name}_{count}"
        self.taken.add(found)
        return found


def _least(dtype: np.dtype[Any]) -> np.float32:
    """The smallest number that keeps all its digits: 6.1e-5 in float16."""
    import ml_dtypes

    return np.float32(ml_dtypes.finfo(dtype).smallest_normal)
