"""Beyond the four usual graphs: ControlNet, residual inputs, hidden states, AutoencoderTiny, 8 and 9 channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import small_bundles
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from helpers import CONTEXT, fixed_weights, tiny_text_encoder, tiny_unet
from small_bundles import TINY_VAE, small_controlnet
from small_exports import references, small_pipeline

from export import export_pipeline
from export.components import component_module, example_inputs, graph_module, module_contract
from export.parity import check_graph
from export.to_onnx import save, to_onnx
from sdkd.contract import Contract, Extras
from sdkd.errors import InputError, ModelError
from sdkd.exportable import module_config
from sdkd.profiles import Range, ShapeRanges
from sdkd.students import build_student


def exported(folder: Path, component: str, module: torch.nn.Module, extras: Extras = Extras()) -> dict[str, Any]:
    """Export in float32 and pass the gate; the figures."""
    contract = module_contract(component, module, "fp32", extras)
    graph = to_onnx(module, contract, module_config(module))
    (file,) = save(graph, folder)
    return check_graph(file, contract, references(module, contract), "fp32")


@pytest.mark.parametrize("student", [False, True])
def test_a_unet_takes_the_residuals_of_a_controlnet(tmp_path: Path, student: bool) -> None:
    """A student without a middle takes the middle's residual, too, as diffusers adds it."""
    module = build_student(tiny_unet(), "tiny") if student else UNet2DConditionModel(**small_bundles.UNET)
    figures = exported(tmp_path, "unet", fixed_weights(module), Extras(residuals=True))
    assert figures["relative"] < 1e-5


@torch.no_grad()
def test_residuals_reach_the_skip_connections_they_belong_to() -> None:
    unet = tiny_unet()
    contract = module_contract("unet", unet, "fp32", Extras(residuals=True))
    sample, timestep, text, *residuals = example_inputs(contract, {
        "batch": 2, "sequence": 5, "height": 8, "width": 16, "height_2": 4, "width_2": 8, "height_4": 2, "width_4": 4,
        "height_8": 1, "width_8": 2,
    })  # fmt: skip
    (found,) = graph_module(contract, unet)(sample, timestep, text, *residuals)
    expected = unet(
        sample,
        timestep,
        text,
        down_block_additional_residuals=residuals[:-1],
        mid_block_additional_residual=residuals[-1],
    ).sample
    torch.testing.assert_close(found, expected)
    assert (found - unet(sample, timestep, text).sample).abs().max() > 0.1


@pytest.mark.parametrize("channels", [8, 9])
def test_unets_that_take_more_than_latents(tmp_path: Path, channels: int) -> None:
    unet = fixed_weights(UNet2DConditionModel(**(small_bundles.UNET | {"in_channels": channels})))
    assert exported(tmp_path, "unet", unet)["relative"] < 1e-5


def test_a_controlnet_gives_the_residuals_of_its_unet(tmp_path: Path) -> None:
    controlnet = small_controlnet()
    figures = exported(tmp_path, "controlnet", controlnet)
    assert figures["relative"] < 1e-5
    outputs = module_contract("controlnet", controlnet, "fp32").outputs
    unet = fixed_weights(UNet2DConditionModel(**small_bundles.UNET))
    inputs = module_contract("unet", unet, "fp32", Extras(residuals=True)).inputs[3:]
    assert [spec.axes for spec in outputs] == [spec.axes for spec in inputs]


@torch.no_grad()
def test_the_conditioning_scale_is_an_input() -> None:
    controlnet = small_controlnet()
    contract = module_contract("controlnet", controlnet, "fp32")
    sizes = {"batch": 1, "sequence": 3, "height": 4, "width": 4, "height_2": 2, "width_2": 2}
    inputs = list(example_inputs(contract, sizes | {"image_height": 8, "image_width": 8}))
    graph = graph_module(contract, controlnet)
    whole = graph(*inputs[:4], torch.tensor(1.0))
    for one, half in zip(whole, graph(*inputs[:4], torch.tensor(0.5)), strict=True):
        torch.testing.assert_close(half, one * 0.5)


def test_a_controlnet_that_pools_its_residuals_is_refused() -> None:
    with pytest.raises(ModelError, match=r"pools its residuals over the image.*not supported"):
        module_contract("controlnet", small_controlnet(global_pool_conditions=True), "fp32")


def test_every_hidden_state_of_the_text_encoder(tmp_path: Path) -> None:
    encoder = tiny_text_encoder()
    assert exported(tmp_path, "text_encoder", encoder, Extras(hidden_states=True))["relative"] < 1e-5
    contract = module_contract("text_encoder", encoder, "fp32", Extras(hidden_states=True))
    ids = torch.tensor([[512, 3, 4, 513]])
    found = graph_module(contract, encoder)(ids)
    expected = encoder(ids, output_hidden_states=True).hidden_states
    assert len(found) == 2 + len(expected) == 5
    for one, other in zip(found[2:], expected, strict=True):
        torch.testing.assert_close(one, other)
    normed = encoder.final_layer_norm(found[-1]) if hasattr(encoder, "final_layer_norm") else found[0]
    torch.testing.assert_close(normed, found[0])


@pytest.mark.parametrize("component", ["vae_decoder", "vae_encoder"])
def test_both_halves_of_a_tiny_autoencoder(tmp_path: Path, component: str) -> None:
    vae = fixed_weights(AutoencoderTiny(**TINY_VAE))
    assert exported(tmp_path, component, vae)["relative"] < 1e-5


@torch.no_grad()
def test_a_tiny_autoencoder_computes_what_diffusers_does() -> None:
    vae = fixed_weights(AutoencoderTiny(**TINY_VAE))
    image = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    contracts: list[Contract] = [module_contract(name, vae, "fp32") for name in ("vae_encoder", "vae_decoder")]
    assert contracts[0].outputs[0].name == "latents"
    (latents,) = graph_module(contracts[0], vae)(image)
    torch.testing.assert_close(latents, vae.encode(image).latents)
    torch.testing.assert_close(graph_module(contracts[1], vae)(latents)[0], vae.decode(latents).sample)


def test_a_pipelines_controlnet_is_a_component() -> None:
    class Pipe:
        controlnet = small_controlnet()

    assert component_module(Pipe(), "controlnet") is Pipe.controlnet
    assert module_config(Pipe.controlnet)["cross_attention_dim"] == CONTEXT


def test_static_shapes_are_in_the_graph_and_pass_the_gate(tmp_path: Path) -> None:
    one = ShapeRanges(*(Range.fixed(size) for size in (1, 32, 48, 77)))
    bundle = export_pipeline(small_pipeline(), tmp_path / "bundle", static=one)
    axes = {name: [spec.axes for spec in record.contract.inputs] for name, record in bundle.manifest.components.items()}
    assert axes == {
        "text_encoder": [(1, 77)],
        "unet": [(2, 4, 16, 24), (), (2, 77, CONTEXT)],  # two copies for guidance
        "vae_decoder": [(1, 4, 16, 24)],
        "vae_encoder": [(1, 3, 32, 48)],
    }
    assert bundle.component("vae_decoder").contract.outputs[0].axes == (1, 3, 32, 48)
    assert all(record.parity and record.parity["finite"] for record in bundle.manifest.components.values())
    graph = onnx.load(bundle.path / "unet" / "model.onnx", load_external_data=False).graph
    assert [dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim] == [2, 4, 16, 24]


def test_a_static_size_must_fit_the_levels_of_the_unet(tmp_path: Path) -> None:
    odd = ShapeRanges(*(Range.fixed(size) for size in (1, 34, 32, 77)))
    with pytest.raises(InputError, match=r"height 34 is not a multiple of 4 pixels"):
        export_pipeline(small_pipeline(), tmp_path / "bundle", static=odd, components=("unet",))
    assert not (tmp_path / "bundle").exists()
