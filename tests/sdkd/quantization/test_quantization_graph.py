"""Q/DQ nodes in graphs: what they compute, what libraries make of them, and what is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from small_exports import half_unet, small_graph

from sdkd.errors import BundleError
from sdkd.quantization.fake import fake_quantized
from sdkd.quantization.graph import layer_kinds, quantize_graph, save_quantized
from sdkd.quantization.scales import to_e4m3, weight_codes
from sdkd.quantization.scheme import LayerScales, Scheme, kept_reason
from sdkd.targets.ort_attention import fuse_attention
from sdkd.targets.registry import openvino_core

U8, S8, E4M3 = Scheme("u8", 7), Scheme("s8"), Scheme("e4m3")
FLOATS = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.float16): TensorProto.FLOAT16}
RNG = np.random.default_rng(0)
WEIGHT, BIAS = RNG.standard_normal((3, 2, 3, 3)).astype(np.float32), np.array([0.5, -1.0, 2.0], np.float32)
MATRIX = RNG.standard_normal((5, 4)).astype(np.float32)  # [out, in]
IMAGE, TOKENS = RNG.standard_normal((1, 2, 4, 4)).astype(np.float32), RNG.standard_normal((1, 3, 4)).astype(np.float32)


def graph(
    nodes: list[Any],
    weights: dict[str, np.ndarray],
    inputs: dict[str, np.ndarray],
    *,
    opset: int = 23,
    outputs: int = 1,
) -> ModelProto:
    """A graph that gives out what its last nodes compute."""
    (kind, rank), *_ = ((FLOATS[value.dtype], value.ndim) for value in inputs.values())
    given = [helper.make_tensor_value_info(name, kind, value.shape) for name, value in inputs.items()]
    found = [helper.make_tensor_value_info(node.output[0], kind, [None] * rank) for node in nodes[-outputs:]]
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(
        helper.make_graph(nodes, "g", given, found, constants), opset_imports=imports, ir_version=10
    )


def convolution(bias: bool = True, **changes: Any) -> ModelProto:
    inputs = ["image", "conv.weight", *(["conv.bias"] if bias else [])]
    node = helper.make_node("Conv", inputs, ["out"], name="conv/Conv", pads=[1, 1, 1, 1])
    weights = {"conv.weight": WEIGHT, **({"conv.bias": BIAS} if bias else {})}
    return graph([node], weights, {"image": IMAGE}, **changes)


def linear(dtype: Any = np.float32, **changes: Any) -> ModelProto:
    """Two linear layers of one input, the second as a Gemm would store it."""
    nodes = [
        helper.make_node("MatMul", ["tokens", "q.weight"], ["a"], name="q/MatMul"),
        helper.make_node("MatMul", ["tokens", "k.weight"], ["b"], name="k/MatMul"),
        helper.make_node("Add", ["a", "b"], ["out"]),
    ]
    weights = {"q.weight": MATRIX.T.astype(dtype), "k.weight": -2 * MATRIX.T.astype(dtype)}
    return graph(nodes, weights, {"tokens": TOKENS.astype(dtype)}, **changes)


def rounded(model: ModelProto, scales: dict[str, LayerScales], scheme: Scheme) -> ModelProto:
    quantize_graph(model, Path(), scales, scheme)
    onnx.checker.check_model(model, full_check=True)
    return model


def options(level: str = "ORT_DISABLE_ALL") -> ort.SessionOptions:
    found = ort.SessionOptions()
    found.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    found.log_severity_level = 3
    return found


def run(model: ModelProto | str, **feeds: np.ndarray) -> np.ndarray:
    """What a graph gives as it is, without fused kernels."""
    source = model if isinstance(model, str) else model.SerializeToString()
    return np.asarray(ort.InferenceSession(source, options()).run(None, feeds)[0])


def codes(x: np.ndarray, scales: LayerScales, low: int = 0, high: int = 255) -> np.ndarray:
    found = (np.rint(x / np.float32(scales.scale)) + scales.zero_point).clip(low, high) - scales.zero_point
    return np.asarray(found * np.float32(scales.scale), np.float32)


def weight_of(weight: np.ndarray, scales: LayerScales, scheme: Scheme) -> np.ndarray:
    found, scale = weight_codes(weight, scales, scheme)
    return np.asarray(found * scale.reshape(-1, *[1] * (weight.ndim - 1)))


def constants(model: ModelProto) -> dict[str, np.ndarray]:
    return {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}


SCALES = LayerScales(0.02, 120, out_scale=0.1, out_zero_point=90)


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [True, False])
def test_a_convolution_computes_with_rounded_numbers(opset: int, bias: bool, outputs: bool) -> None:
    scheme = Scheme("u8", 7, outputs=outputs)
    model = rounded(convolution(bias, opset=opset), {"conv": SCALES}, scheme)
    found = run(model, image=IMAGE)
    x, w = codes(IMAGE, SCALES), weight_of(WEIGHT, SCALES, scheme)
    exact = torch.nn.functional.conv2d(torch.tensor(x), torch.tensor(w), padding=1).numpy()
    exact = exact + (BIAS.reshape(1, 3, 1, 1) if bias else 0)
    step = 0.1 if outputs else 0  # a sum that lies between two codes may become either
    np.testing.assert_allclose(found, exact, atol=step / 2 + 1e-3)
    if outputs:
        np.testing.assert_allclose(found / 0.1, np.rint(found / 0.1), atol=1e-4)
    assert [node.name for node in model.graph.node if node.op_type == "Conv"] == ["conv/Conv"]
    assert layer_kinds(model) == {"conv": "int8"}


def test_a_bias_becomes_whole_numbers_of_the_products_scale() -> None:
    found = constants(rounded(convolution(), {"conv": SCALES}, Scheme("u8", 7, outputs=True)))
    scale = np.float32(0.02) * found["conv.weight_scale"]
    np.testing.assert_allclose(found["conv.bias_scale"], scale)
    np.testing.assert_array_equal(found["conv.bias_int32"], np.rint(BIAS / scale))
    assert {"conv.weight", "conv.bias"}.isdisjoint(found)


def test_a_bias_that_int32_cannot_hold_makes_its_channels_scale_larger() -> None:
    model = convolution()
    silent = np.concatenate([0 * WEIGHT[:1], WEIGHT[1:]])
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(silent, "conv.weight"))
    found = run(rounded(model, {"conv": SCALES}, Scheme("u8", 7, outputs=True)), image=0 * IMAGE)
    np.testing.assert_allclose(found[0, :, 1, 1], BIAS, atol=1e-5)


@pytest.mark.parametrize("scheme", [U8, S8, E4M3])
def test_linear_layers_of_one_input_share_its_rounding_and_smoothing(scheme: Scheme) -> None:
    smooth = np.array([0.5, 1, 2, 4], np.float32)
    zero = 128 if scheme is U8 else 0
    scales = LayerScales(0.03 if scheme is not E4M3 else 0.01, zero, smooth)
    model = rounded(linear(), {"q": scales, "k": scales}, scheme)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds == {"Mul": 1, "QuantizeLinear": 1, "DequantizeLinear": 4, "MatMul": 2, "Add": 1}
    x = TOKENS / smooth
    low, high = (0, 255) if scheme is U8 else (-128, 127)
    x = to_e4m3(x / np.float32(0.01)) * np.float32(0.01) if scheme is E4M3 else codes(x, scales, low, high)
    wanted = x @ (weight_of(MATRIX, scales, scheme) + weight_of(-2 * MATRIX, scales, scheme)).T
    np.testing.assert_allclose(run(model, tokens=TOKENS), wanted, atol=1e-5)
    assert layer_kinds(model) == dict.fromkeys("qk", "fp8" if scheme is E4M3 else "int8")


def test_layers_with_other_scales_round_for_themselves() -> None:
    model = rounded(linear(), {"k": LayerScales(0.03, 128), "q": LayerScales(0.02, 128)}, U8)
    assert [node.name for node in model.graph.node if node.op_type == "QuantizeLinear"] == [
        "q.input/QuantizeLinear",
        "k.input/QuantizeLinear",
    ]
    assert {"q.input_int8", "k.input_int8"} <= {name for node in model.graph.node for name in node.output}


def test_the_rounded_layers_are_named_in_the_graphs_order_and_others_stay() -> None:
    model = linear()
    assert quantize_graph(model, Path(), {"k": LayerScales(0.03), "q": LayerScales(0.03)}, S8) == ("q", "k")
    one = linear()
    assert quantize_graph(one, Path(), {"k": LayerScales(0.03)}, S8) == ("k",)
    assert layer_kinds(one) == {"q": "fp32", "k": "int8"}
    np.testing.assert_array_equal(constants(one)["q.weight"], MATRIX.T)


def test_a_layer_called_twice_and_a_weight_read_elsewhere() -> None:
    nodes = [
        helper.make_node("Gemm", ["rows", "layer.weight"], ["a"], transB=1),
        helper.make_node("Gemm", ["more", "layer.weight"], ["b"], transB=1),
        helper.make_node("ReduceSum", ["layer.weight"], ["sum"], keepdims=0),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("Add", ["c", "sum"], ["out"]),
    ]
    rows, more = TOKENS[0], TOKENS[0, ::-1].copy()
    model = graph(nodes, {"layer.weight": MATRIX}, {"rows": rows, "more": more})
    scales = LayerScales(0.03, 100)
    found = run(rounded(model, {"layer": scales}, U8), rows=rows, more=more)
    wanted = (codes(rows, scales) + codes(more, scales)) @ weight_of(MATRIX, scales, U8).T + MATRIX.sum()
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert Counter(one.name for one in model.graph.initializer if one.name.startswith("layer.weight")) == Counter(
        ["layer.weight", "layer.weight_int8", "layer.weight_scale"]
    )


def test_weights_alone_are_rounded_where_the_scheme_says_so() -> None:
    scheme = Scheme("none")
    model = rounded(linear(), {"q": LayerScales(1.0)}, scheme)
    wanted = TOKENS @ (weight_of(MATRIX, LayerScales(1.0), scheme) - 2 * MATRIX).T
    np.testing.assert_allclose(run(model, tokens=TOKENS), wanted, atol=1e-5)
    assert layer_kinds(model) == {"q": "int8 weights", "k": "fp32"}


def test_scales_of_a_float16_graph_stay_above_its_smallest_normal_number() -> None:
    model = linear(np.float16)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array((MATRIX.T / 1000).astype(np.float16), "q.weight"))
    quantize_graph(model, Path(), {"q": LayerScales(1e-7), "k": LayerScales(0.03)}, S8)
    found, least = constants(model), 2.0**-14
    assert found["q.input_scale"] == np.float16(least)
    assert {found[name].dtype for name in ("q.input_scale", "k.weight_scale")} == {np.dtype(np.float16)}
    np.testing.assert_array_equal(found["q.weight_scale"], np.full(5, least, np.float16))
    np.testing.assert_allclose(found["q.weight_int8"] * least, MATRIX.T / 1000, atol=least / 2 + 1e-6)
    assert found["k.weight_scale"].min() > 0.01


def test_what_a_graph_cannot_hold_is_refused() -> None:
    with pytest.raises(
        BundleError, match=r"does not hold 1 of 2 layers by name \(first: 'v'\): export the model again"
    ):
        quantize_graph(linear(), Path(), {"q": LayerScales(1.0), "v": LayerScales(1.0)}, U8)
    with pytest.raises(BundleError, match=r"of opset 18, and scales in float16 need opset 19 .* --opset 23"):
        quantize_graph(linear(np.float16, opset=18), Path(), {"q": LayerScales(1.0)}, S8)
    with pytest.raises(BundleError, match=r"of opset 18, and E4M3 needs opset 19"):
        quantize_graph(linear(opset=18), Path(), {"q": LayerScales(1.0)}, E4M3)
    with pytest.raises(BundleError, match=r"layer 'q' computes in float16.*--precision fp32"):
        quantize_graph(linear(np.float16), Path(), {"q": LayerScales(1.0)}, Scheme("s8", outputs=True))
    with pytest.raises(BundleError, match=r"layer 'conv' say nothing of what it gives: calibrate again"):
        quantize_graph(convolution(), Path(), {"conv": LayerScales(1.0)}, Scheme("u8", outputs=True))


def test_a_saved_graph_has_all_its_weights_in_one_file_beside_it(tmp_path: Path) -> None:
    big = RNG.standard_normal((4, 200)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["tokens", "a.weight"], ["x"]),
        helper.make_node("Relu", ["x"], ["y"]),
        helper.make_node("MatMul", ["y", "b.weight"], ["out"]),
    ]
    weights = {"a.weight": big, "b.weight": big.T.copy(), "small": np.ones(1, np.float32)}
    source = tmp_path / "source" / "model.onnx"
    source.parent.mkdir()
    made = graph(nodes, weights, {"tokens": TOKENS})
    onnx.save(made, source, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    model = onnx.load(source, load_external_data=False)
    scales = LayerScales(0.03, 128)
    quantize_graph(model, source.parent, {"a": scales}, U8)
    outside = [one.name for one in model.graph.initializer if one.data_location == TensorProto.EXTERNAL]
    assert outside == ["b.weight", "small"]
    saved = tmp_path / "new.onnx"
    save_quantized(model, source.parent, saved)
    assert {file.name for file in tmp_path.iterdir()} == {"source", "new.onnx", "new.onnx.data"}
    assert (tmp_path / "new.onnx.data").stat().st_size == 3200  # b's floats; a's codes, 800 bytes, are in the graph
    wanted = np.maximum(codes(TOKENS, scales) @ weight_of(big.T, scales, U8).T, 0) @ big.T
    np.testing.assert_allclose(run(str(saved), tokens=TOKENS), wanted, atol=1e-4)


# A whole UNet


def unet_scales(file: Path, activations: str = "u8") -> dict[str, LayerScales]:
    """The same scale for every layer that is rounded by default: inputs from -6 to 6, outputs, too."""
    weights = [
        one.name for one in onnx.load(file).graph.initializer if one.name.endswith(".weight") and len(one.dims) > 1
    ]
    layers = [name.removesuffix(".weight") for name in weights]
    scale, zero = {"u8": (12 / 255, 128), "s8": (6 / 127, 0), "e4m3": (6 / 448, 0)}[activations]
    found = LayerScales(scale, zero, out_scale=scale, out_zero_point=zero)
    return {layer: found for layer in layers if kept_reason(layer) is None}


def rounded_unet(folder: Path, scheme: Scheme) -> Path:
    """The small UNet's graph, rounded and saved."""
    source, saved = small_graph("unet")[3], folder / "model.onnx"
    model = onnx.load(source, load_external_data=False)
    quantize_graph(model, source.parent, unet_scales(source), scheme)
    save_quantized(model, source.parent, saved)
    return saved


def unet_feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    sample, context = rng.standard_normal((2, 4, 16, 16)), rng.standard_normal((2, 77, 32))
    return {
        "sample": sample.astype(np.float32),
        "timestep": np.array(500, np.float32),
        "encoder_hidden_states": context.astype(np.float32),
    }


@pytest.mark.parametrize("outputs", [True, False])
def test_every_layer_of_a_unet_computes_as_the_rounded_module_does(tmp_path: Path, outputs: bool) -> None:
    module, _, _, source = small_graph("unet")
    scheme, scales = Scheme("u8", 7, outputs=outputs), unet_scales(source)
    reads = {node.name: node.input[0] for node in onnx.load(source).graph.node if node.input}
    model = onnx.load(rounded_unet(tmp_path, scheme))
    nodes = [node for node in model.graph.node if any(name.endswith(".weight_rounded") for name in node.input)]
    wanted = list(dict.fromkeys(name for node in nodes for name in (reads[node.name], node.output[0])))
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in wanted)
    session = ort.InferenceSession(model.SerializeToString(), options())
    found = dict(zip(wanted, session.run(wanted, unet_feeds()), strict=True))
    assert len(nodes) == len(scales)
    inputs_alone = {layer: replace(one, out_scale=None) for layer, one in scales.items()}
    with torch.inference_mode(), fake_quantized(module, inputs_alone, replace(scheme, outputs=False)):
        for node in nodes:
            layer = module.get_submodule(node.name.rpartition("/")[0])
            exact = layer(torch.tensor(found[reads[node.name]])).numpy()
            given = found[node.output[0]]
            if node.op_type == "MatMul" and layer.bias is not None:  # which the graph adds afterwards
                exact = exact - layer.bias.numpy()
            np.testing.assert_allclose(given, exact, atol=1e-3 if outputs else 1e-5, err_msg=node.name)


def test_onnxruntime_fuses_every_rounded_layer_and_attention_still(tmp_path: Path) -> None:
    model = onnx.load(rounded_unet(tmp_path, Scheme("u8", 7, outputs=True)))
    kinds = Counter(node.op_type for node in model.graph.node if "weight_rounded" in "".join(node.input))
    heads = fuse_attention(model)
    saving = options("ORT_ENABLE_EXTENDED")
    saving.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(model.SerializeToString(), saving)
    found = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert found["QLinearConv"] == kinds["Conv"] > 10
    assert found["MatMulIntegerToFloat"] == kinds["MatMul"] == 30
    assert found["MultiHeadAttention"] == heads > 4
    assert found["Conv"] == 7  # kept float: the first and last one, and shortcuts
    assert found["MatMul"] == 0


def openvino_run(
    model: ModelProto | Path, feeds: dict[str, np.ndarray], batches: tuple[int, int] | None = None
) -> tuple[np.ndarray, Counter[str]]:
    """What OpenVINO gives, and how many of its layers of each kind compute in what: {"Convolution u8": 1}.

    `batches`: the least and the most that it is compiled for.
    """
    pytest.importorskip("openvino")
    core, read = openvino_core(), str(model) if isinstance(model, Path) else model.SerializeToString()
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    network = core.read_model(read)
    if batches is not None:
        network.reshape({name: [batches, *value.shape[1:]] for name, value in feeds.items()})
    compiled = core.compile_model(network, "CPU", config)
    facts = [operation.get_rt_info() for operation in compiled.get_runtime_model().get_ops()]
    names = [" ".join(one[name].astype(str) for name in ("layerType", "runtimePrecision")) for one in facts]
    return next(iter(compiled(feeds).values())), Counter(names)


@pytest.mark.parametrize("scheme", [U8, Scheme("u8", 7, outputs=True)])
def test_openvino_computes_in_integers_what_the_graph_says(scheme: Scheme) -> None:
    rng = np.random.default_rng(2)
    weights = {
        "conv.weight": rng.standard_normal((32, 16, 3, 3)).astype(np.float32),
        "conv.bias": rng.standard_normal(32).astype(np.float32),
        "linear.weight": rng.standard_normal((32, 64)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["image", "conv.weight", "conv.bias"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Transpose", ["a"], ["b"], perm=[0, 2, 3, 1]),
        helper.make_node("Softmax", ["b"], ["c"], axis=-1),
        helper.make_node("MatMul", ["c", "linear.weight"], ["out"]),
    ]
    feeds = {"image": rng.standard_normal((2, 16, 8, 8)).astype(np.float32)}
    scales = {"conv": LayerScales(6 / 255, 128, out_scale=0.5, out_zero_point=128), "linear": LayerScales(1 / 255)}
    model = rounded(graph(nodes, weights, feeds), scales, scheme)
    found, kinds = openvino_run(model, feeds)
    assert (kinds["Convolution u8"], kinds["FullyConnected u8"]) == (1, 1)
    assert kinds["Convolution f32"] + kinds["FullyConnected f32"] == 0
    wanted = run(model, **feeds)
    assert float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)) < 0.01


def test_openvino_takes_all_of_a_unets_rounded_layers_in_integers(tmp_path: Path) -> None:
    saved = rounded_unet(tmp_path, U8)
    kinds = Counter(layer_kinds(onnx.load(saved)).values())
    found, names = openvino_run(saved, unet_feeds())
    assert np.isfinite(found).all()
    assert names["Convolution u8"] + names["FullyConnected u8"] == kinds["int8"] == 50
    assert names["Convolution f32"] + names["FullyConnected f32"] == kinds["fp32"]


@pytest.mark.parametrize("bias", [None, 0.0, 1.0])
def test_openvino_scales_once_what_several_nodes_read(bias: float | None) -> None:
    rng = np.random.default_rng(3)
    weights = {f"{name}.weight": rng.standard_normal((16, 16, 3, 3)).astype(np.float32) for name in "abc"}
    biases = {} if bias is None else {"a.bias": np.full(16, bias, np.float32)}
    nodes = [
        helper.make_node("Conv", ["image", "a.weight", *biases], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Softmax", ["a"], ["b_in"], axis=1),
        helper.make_node("Conv", ["b_in", "b.weight"], ["b"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["a", "b"], ["sum"]),
        helper.make_node("Conv", ["sum", "c.weight"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Concat", ["a", "c"], ["out"], axis=1),
    ]
    feeds = {"image": rng.standard_normal((2, 16, 8, 8)).astype(np.float32)}
    scales = {"a": LayerScales(8 / 255, 128), "b": LayerScales(1 / 255), "c": LayerScales(80 / 255, 128)}
    model = rounded(graph(nodes, weights | biases, feeds), scales, U8)
    found, kinds = openvino_run(model, feeds, batches=(1, 2))
    assert kinds["Convolution u8"] == 3
    wanted = run(model, **feeds)
    assert float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)) < 1e-5


@pytest.mark.parametrize("scheme", [S8, E4M3])
def test_tensorrt_rtx_builds_a_rounded_half_precision_unet(tmp_path: Path, scheme: Scheme) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    source, saved = half_unet()[3], tmp_path / "model.onnx"
    model = onnx.load(source, load_external_data=False)
    quantize_graph(model, source.parent, unet_scales(source, scheme.activations), scheme)
    save_quantized(model, source.parent, saved)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(saved)), str(parser.get_error(0))
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for name, value in unet_feeds().items():
        profile.set_shape(name, *[value.shape] * 3)
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config).nbytes > 100_000
