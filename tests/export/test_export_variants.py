"""Beyond the four usual graphs: ControlNet, residual inputs, hidden states, AutoencoderTiny, 8 and 9 channels."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import small_bundles
import torch
from diffusers import UNet2DConditionModel
from helpers import CONTEXT, fixed_weights, tiny_text_encoder, tiny_unet
from small_bundles import small_controlnet
from small_exports import ONE_LEVEL, small_pipeline, tiny_vae, variant_bundle, variant_pipeline

from export import export_pipeline
from export.graph.components import component_module, example_inputs, graph_module, module_contract
from sdkd.bundle.manifest import Bundle
from sdkd.core.conditions import Extras
from sdkd.core.contract import Contract
from sdkd.core.profiles import Range, ShapeRanges, static_contract
from sdkd.errors import InputError
from sdkd.families import STABLE_DIFFUSION


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("controlnet", "unet"),  # without a middle, and takes the middle's residual all the same
        ("controlnet", "controlnet"),
        ("controlnet", "text_encoder"),
        ("pix2pix", "unet"),
        ("inpaint", "unet"),
        ("taesd", "vae_decoder"),
        ("taesd", "vae_encoder"),
        ("embedded", "unet"),
    ],
)
def test_the_graph_computes_what_its_module_does(name: str, component: str) -> None:
    record = Bundle.open(variant_bundle(name)).component(component)
    assert record.contract == module_contract(
        component,
        component_module(variant_pipeline(name), component),
        "fp32",
        Extras(residuals=name == "controlnet" and component == "unet", hidden_states=component == "text_encoder"),
    )
    assert record.parity
    assert record.parity["relative"] < 1e-5
    assert record.details.get("reused") is None


@torch.no_grad()
@pytest.mark.parametrize("width", [None, 8])  # of a guidance embedding
def test_residuals_reach_the_skip_connections_they_belong_to(width: int | None) -> None:
    unet = tiny_unet(time_cond_proj_dim=width)
    contract = module_contract("unet", unet, "fp32", Extras(residuals=True))
    sample, timestep, text, *more = example_inputs(contract, {
        "batch": 2, "sequence": 5, "height": 8, "width": 16, "height_2": 4, "width_2": 8, "height_4": 2, "width_4": 4,
        "height_8": 1, "width_8": 2,
    })  # fmt: skip
    (found,) = graph_module(contract, unet)(sample, timestep, text, *more)
    guidance, residuals = (more[0], more[1:]) if width else (None, more)
    expected = unet(
        sample,
        timestep,
        text,
        timestep_cond=guidance,
        down_block_additional_residuals=residuals[:-1],
        mid_block_additional_residual=residuals[-1],
    ).sample
    torch.testing.assert_close(found, expected)
    assert (found - unet(sample, timestep, text, timestep_cond=guidance).sample).abs().max() > 0.1


def test_a_controlnet_gives_the_residuals_of_its_unet() -> None:
    outputs = module_contract("controlnet", small_controlnet(), "fp32").outputs
    unet = UNet2DConditionModel(**small_bundles.UNET)
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


def test_every_hidden_state_of_the_text_encoder() -> None:
    encoder = tiny_text_encoder()
    contract = module_contract("text_encoder", encoder, "fp32", Extras(hidden_states=True))
    ids = torch.tensor([[512, 3, 4, 513]])
    found = graph_module(contract, encoder)(ids)
    expected = encoder(ids, output_hidden_states=True).hidden_states
    assert len(found) == 2 + len(expected) == 5
    for one, other in zip(found[2:], expected, strict=True):
        torch.testing.assert_close(one, other)
    normed = encoder.final_layer_norm(found[-1]) if hasattr(encoder, "final_layer_norm") else found[0]
    torch.testing.assert_close(normed, found[0])


@torch.no_grad()
def test_a_tiny_autoencoder_computes_what_diffusers_does() -> None:
    vae = tiny_vae()
    image = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    contracts: list[Contract] = [module_contract(name, vae, "fp32") for name in ("vae_encoder", "vae_decoder")]
    assert contracts[0].outputs[0].name == "latents"
    (latents,) = graph_module(contracts[0], vae)(image)
    torch.testing.assert_close(latents, vae.encode(image).latents)
    torch.testing.assert_close(graph_module(contracts[1], vae)(latents)[0], vae.decode(latents).sample)


def test_static_shapes_are_in_the_graph_and_pass_the_gate(tmp_path: Path) -> None:
    one = ShapeRanges(*(Range.fixed(size) for size in (1, 32, 48, 77)))
    pipe = small_pipeline()
    contracts = {
        name: module_contract(name, component_module(pipe, name), "fp32") for name in STABLE_DIFFUSION.components
    }
    fixed = {name: static_contract(contract, one, 2, 77) for name, contract in contracts.items()}
    axes = {name: [spec.axes for spec in contract.inputs] for name, contract in fixed.items()}
    assert axes == {
        "text_encoder": [(1, 77)],
        "unet": [(2, 4, 16, 24), (), (2, 77, CONTEXT)],  # two copies for guidance
        "vae_decoder": [(1, 4, 16, 24)],
        "vae_encoder": [(1, 3, 32, 48)],
    }
    pipe.unet = fixed_weights(UNet2DConditionModel(**ONE_LEVEL))
    assert fixed["vae_decoder"].outputs[0].axes == (1, 3, 32, 48)
    bundle = export_pipeline(pipe, tmp_path / "bundle", static=one, components=("unet",))
    record = bundle.component("unet")
    assert record.contract == fixed["unet"]
    assert record.parity
    assert record.parity["finite"] is True
    graph = onnx.load(bundle.path / "unet" / "model.onnx", load_external_data=False).graph
    assert [dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim] == [2, 4, 16, 24]


def test_a_static_size_must_fit_the_levels_of_the_unet(tmp_path: Path) -> None:
    odd = ShapeRanges(*(Range.fixed(size) for size in (1, 34, 32, 77)))
    with pytest.raises(InputError, match=r"height 34 is not a multiple of 4 pixels"):
        export_pipeline(small_pipeline(), tmp_path / "bundle", static=odd, components=("unet",))
    assert not (tmp_path / "bundle").exists()
