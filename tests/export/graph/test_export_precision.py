"""Casting a module, and the float32 islands of a half-precision graph."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from small_exports import half_unet, small_graph, small_pipeline

from export import export_pipeline
from export.component import ExportOptions, export_component
from export.graph.precision import cast, check_finite
from export.source import open_source
from sdkd.core.contract import torch_dtype
from sdkd.errors import ExportError, InputError


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(InputError, match="precision 'fp8' is unknown: choose one of fp32, fp16, bf16"):
        torch_dtype("fp8")


def test_a_weight_that_half_cannot_hold_is_named() -> None:
    encoder = small_pipeline().text_encoder
    encoder.final_layer_norm.weight.data[3] = -70000.0
    with pytest.raises(ExportError, match=r"1 weights are larger than 65504.*final_layer_norm\.weight.*bf16"):
        cast(encoder, "fp16")
    assert encoder.final_layer_norm.weight.dtype == torch.float32
    assert cast(encoder, "bf16").final_layer_norm.weight[3] == -70144.0  # the nearest bfloat16


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_not_finite_are_refused_before_the_trace(value: float, tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).half()
    assert check_finite(module, "fp16") is module
    module[1].bias.data[1] = value
    with pytest.raises(ExportError, match=r"1 weights are NaN or infinite in fp16 \(first: 1\.bias\)"):
        check_finite(module, "fp16")
    pipe, said = small_pipeline(), []
    pipe.unet.conv_in.bias.data[2] = value
    with pytest.raises(ExportError, match=r"1 weights are NaN or infinite in fp32 .*conv_in\.bias\): .* or train it"):
        export_component(
            open_source(pipe, {}), "unet", ExportOptions("fp32"), {}, tmp_path, False, lambda text, _: said.append(text)
        )
    assert not said  # nothing was computed


def test_norm_statistics_and_timestep_embedding_stay_float32() -> None:
    module, graph, _, _ = half_unet()
    norms = sum(isinstance(part, torch.nn.GroupNorm) for part in module.modules())
    layers = sum(isinstance(part, torch.nn.LayerNorm) for part in module.modules())
    assert graph.float_nodes["GroupNormalization"] == norms
    assert graph.float_nodes["LayerNormalization"] == layers
    assert graph.float_nodes["Sin"] == graph.float_nodes["Cos"] == 1
    assert not {"Conv", "MatMul", "Attention", "Gemm"} & set(graph.float_nodes)
    assert small_graph("text_encoder")[1].float_nodes == {}  # in float32


def test_softmax_of_attention_that_is_not_whole_stays_float32(tmp_path: Path) -> None:
    bundle = export_pipeline(small_pipeline(), tmp_path / "bundle", precision="bf16", components=("vae_decoder",))
    record = bundle.component("vae_decoder")
    assert record.contract.outputs[0].dtype == "bfloat16"
    assert record.parity
    assert "float32 twin" in record.parity["runtime"]
    assert 1e-4 < record.parity["relative"] < 5e-2
    assert record.details["float32_nodes"]["Softmax"] == record.details["operators"]["Softmax"] == 1
    nodes = onnx.load(bundle.path / "vae_decoder" / "model.onnx").graph.node
    (softmax,) = (node for node in nodes if node.op_type == "Softmax")
    assert [node.op_type for node in nodes if softmax.output[0] in node.input] == ["Cast"]
    assert [node.op_type for node in nodes if softmax.input[0] in node.output] == ["Cast"]
