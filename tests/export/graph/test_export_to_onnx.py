"""The graph: names, axes, opsets, weights under their state-dict names, nothing of this machine in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderKL
from helpers import tiny_text_encoder
from small_bundles import VAE
from small_exports import half_unet, small_graph

from export.check.onnx_run import read_signature
from export.graph.components import component_state, module_contract
from export.graph.to_onnx import OPSETS, choose_opset, save, to_onnx
from sdkd.bundle.onnx_weights import read_weights
from sdkd.core.components import COMPONENTS
from sdkd.errors import BundleError, ExportError, InputError
from sdkd.families import STABLE_DIFFUSION
from sdkd.models.exportable import module_config


@pytest.mark.parametrize("component", STABLE_DIFFUSION.components)
def test_names_dtypes_and_dynamic_axes_are_the_contracts(component: str) -> None:
    _, _, contract, file = small_graph(component)
    assert read_signature(file, component) == contract
    onnx.checker.check_model(str(file), full_check=True)


def test_half_graph_has_half_tensors_and_a_float32_timestep() -> None:
    module, _, contract, file = half_unet()
    assert read_signature(file, "unet") == contract
    assert [spec.dtype for spec in contract.inputs] == ["float16", "float32", "float16"]
    kinds = {tensor.data_type for tensor in onnx.load(file).graph.initializer if tensor.name.endswith(".weight")}
    assert kinds == {onnx.TensorProto.FLOAT16}
    state = module.state_dict()
    weights = read_weights(file, state)
    assert all(np.array_equal(weights[name], value.numpy()) for name, value in state.items())


@pytest.mark.parametrize("component", STABLE_DIFFUSION.components)
def test_the_state_dict_can_be_read_back_from_the_file(component: str) -> None:
    module, graph, _, file = small_graph(component)
    state = component_state(component, module)
    assert graph.unmatched == ()
    weights = read_weights(file, state)
    assert list(weights) == list(state)
    for name, value in state.items():
        np.testing.assert_array_equal(weights[name], value.numpy(), err_msg=name)


def test_linear_weights_are_stored_transposed_and_say_so() -> None:
    module, graph, _, file = small_graph("unet")
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    stored = {tensor.name: tensor for tensor in onnx.load(file).graph.initializer}[name]
    weight = module.state_dict()[name]
    assert graph.transforms[name] == "transpose"
    assert tuple(weight.shape) == (16, 32)
    assert list(stored.dims) == [32, 16]
    assert graph.transforms["conv_in.weight"] == "same"


def test_reading_weights_that_are_not_there_names_the_first() -> None:
    _, _, _, file = small_graph("text_encoder")
    with pytest.raises(BundleError, match=r"does not hold 1 of 1 weights by name \(first: conv_in\.weight\)"):
        read_weights(file, ["conv_in.weight"])


@pytest.mark.parametrize("opset", [18, 22])
def test_zero_biases_and_unit_norms_stay_and_equal_weights_stay_apart(opset: int) -> None:
    torch.manual_seed(0)
    one_level = {"block_out_channels": (8,), "down_block_types": VAE["down_block_types"][:1]}
    fresh = AutoencoderKL(**(VAE | one_level | {"up_block_types": VAE["up_block_types"][:1]})).eval()
    for name, weight in fresh.named_parameters():
        weight.data.fill_(float("norm" in name and name.endswith("weight")))  # all 0, or all 1
    graph = to_onnx(fresh, module_contract("vae_encoder", fresh, "fp32"), module_config(fresh), opset)
    state = component_state("vae_encoder", fresh)
    assert graph.unmatched == ()
    assert set(graph.transforms) == set(state)
    assert set(state) <= set(graph.model.graph.initializers)
    shapes = {name: list(graph.model.graph.initializers[name].shape) for name in state}
    flipped = {name for name, transform in graph.transforms.items() if transform == "transpose"}
    assert all(shapes[name] == list(value.shape)[:: -1 if name in flipped else 1] for name, value in state.items())


def test_opset_23_keeps_attention_and_22_does_not() -> None:
    unet, vae = small_graph("unet")[1], small_graph("vae_decoder")[1]
    assert (unet.opset, unet.nodes["Attention"], unet.nodes["Softmax"]) == (23, 6, 0)  # 3 transformer blocks
    assert (vae.opset, vae.nodes["Attention"], vae.nodes["Softmax"]) == (22, 0, 1)
    assert unet.nodes["GroupNormalization"] > 0
    assert vae.nodes["GroupNormalization"] > 0
    assert unet.nodes["InstanceNormalization"] == vae.nodes["InstanceNormalization"] == 0


def test_opsets_have_limits() -> None:
    assert set(OPSETS) == set(COMPONENTS)
    assert choose_opset("vae_decoder") == 22
    assert choose_opset("vae_decoder", 18) == 18
    with pytest.raises(InputError, match="opset 17 is not between 18 and 23"):
        choose_opset("unet", 17)


def test_nodes_are_named_by_module_and_nothing_of_this_machine_is_in_the_file() -> None:
    _, _, _, file = small_graph("unet")
    names = [node.name for node in onnx.load(file).graph.node]
    assert len(set(names)) == len(names)
    assert "down_blocks.0.resnets.0.conv1/Conv" in names
    assert "up_blocks.1.attentions.0.transformer_blocks.0.attn1/Attention" in names
    content = file.read_bytes()
    assert b"site-packages" not in content
    assert b".py" not in content
    assert str(Path.cwd()).encode() not in content


def test_large_weights_go_beside_the_graph(tmp_path: Path) -> None:
    module, graph, contract, _ = small_graph("text_encoder")
    files = save(graph, tmp_path, limit=1000)
    assert [file.name for file in files] == ["model.onnx", "model.onnx.data"]
    assert files[0].stat().st_size < files[1].stat().st_size
    assert read_signature(files[0], "text_encoder") == contract
    (tmp_path / "initializers.json").write_text('{"final_layer_norm.bias": "same"}')
    read = read_weights(files[0], ["final_layer_norm.bias"])["final_layer_norm.bias"]
    np.testing.assert_array_equal(read, module.state_dict()["final_layer_norm.bias"].numpy())


class _Branching(torch.nn.Module):
    """Something that torch.export cannot follow: a branch on a value."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: torch.Tensor) -> object:
        return self.encoder(ids if ids.sum() > 0 else ids + 1)


def test_a_failure_names_the_component_and_the_cause(capfd: pytest.CaptureFixture[str]) -> None:
    encoder = tiny_text_encoder()
    contract, config = module_contract("text_encoder", encoder, "fp32"), module_config(encoder)
    with pytest.raises(ExportError, match=r"text_encoder could not be exported at opset 23 \(.*: .*data-dependent"):
        to_onnx(_Branching(encoder), contract, config)
    assert capfd.readouterr().out == ""
