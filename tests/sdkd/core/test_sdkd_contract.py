from __future__ import annotations

import pytest
import torch

from sdkd.core.contract import (
    Contract,
    Extras,
    axis_ranges,
    check_precision,
    check_size,
    component_contract,
    size_multiple,
    unet_contract,
    vae_scale,
)
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.errors import InputError, ModelError

UNET = {"in_channels": 9, "out_channels": 4, "cross_attention_dim": 768, "block_out_channels": [320, 640, 1280, 1280]}
VAE = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [128, 256, 512, 512]}


def test_unet_contract_takes_every_size_from_the_config() -> None:
    contract = unet_contract(UNET, "fp16")
    assert [spec.name for spec in contract.inputs] == ["sample", "timestep", "encoder_hidden_states"]
    assert contract.inputs[0].axes == ("batch", 9, "height", "width")
    assert contract.inputs[1].axes == ()
    assert contract.inputs[1].dtype == "float32"
    assert contract.inputs[2].axes == ("batch", "sequence", 768)
    assert contract.outputs[0].axes == ("batch", 4, "height", "width")
    assert contract.outputs[0].dtype == "float16"
    assert contract.axis_names() == ("batch", "height", "width", "sequence")


def test_a_shape_is_made_of_axis_sizes() -> None:
    sample = unet_contract(UNET, "fp32").inputs[0]
    assert sample.shape({"batch": 2, "height": 64, "width": 96}) == (2, 9, 64, 96)


@pytest.mark.parametrize("component", ["unet", "vae_decoder", "vae_encoder", "text_encoder"])
def test_a_contract_survives_json(component: str) -> None:
    config = UNET | VAE | {"in_channels": 3, "hidden_size": 768, "num_hidden_layers": 12}
    contract = component_contract(component, config, "bf16")
    assert Contract.from_json(contract.to_json()) == contract


def test_an_unknown_component_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"'adapter' is unknown: choose from text_encoder, unet"):
        component_contract("adapter", {}, "fp32")


def test_a_unet_with_two_context_sizes_is_refused() -> None:
    with pytest.raises(ModelError, match=r"cross_attention_dim \[768, 1024\] is not one integer"):
        unet_contract(UNET | {"cross_attention_dim": [768, 1024]}, "fp32")


def test_an_unknown_precision_lists_the_known() -> None:
    with pytest.raises(InputError, match="precision 'int8' is unknown: choose one of fp32, fp16, bf16"):
        check_precision("int8")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("512", (512, 512, 512)), ("512..768", (512, 512, 768)), ("1..2..4", (1, 2, 4)), (" 64 ", (64, 64, 64))],
)
def test_ranges_are_read(text: str, expected: tuple[int, int, int]) -> None:
    found = Range.parse(text)
    assert (found.min, found.opt, found.max) == expected


@pytest.mark.parametrize("text", ["", "512-768", "a..b", "1..2..3..4", "-1"])
def test_a_range_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"is not understood: give 512, 512\.\.768 or min\.\.opt\.\.max"):
        Range.parse(text)


def test_a_range_must_be_ordered() -> None:
    with pytest.raises(InputError, match=r"range 4\.\.4\.\.1 is not ordered"):
        Range.parse("4..1")


def test_the_unet_batch_covers_both_halves_of_guidance() -> None:
    ranges = ShapeRanges(Range(1, 2, 4), Range(512, 512, 768), Range(512, 640, 768), Range.fixed(77))
    axes = axis_ranges(unet_contract(UNET, "fp32"), ranges, 8)
    assert axes["batch"] == Range(1, 4, 8)
    assert axes["height"] == Range(64, 64, 96)
    assert axes["width"] == Range(64, 80, 96)
    assert axis_ranges(component_contract("vae_decoder", VAE, "fp32"), ranges, 8)["batch"] == Range(1, 2, 4)


def test_instruct_pix2pix_stacks_three_copies() -> None:
    contract = unet_contract(UNET | {"in_channels": 8}, "fp32")
    assert axis_ranges(contract, ShapeRanges(*(Range.fixed(size) for size in (2, 512, 512, 77))), 8)["batch"].max == 6


def test_longer_prompts_reach_the_unet_and_not_the_text_encoder() -> None:
    ranges = ShapeRanges(Range.fixed(1), Range.fixed(512), Range.fixed(512), Range(77, 77, 231))
    text = component_contract("text_encoder", {"hidden_size": 768, "num_hidden_layers": 12}, "fp32")
    assert axis_ranges(unet_contract(UNET, "fp32"), ranges, 8, 77)["sequence"] == Range(77, 77, 231)
    assert axis_ranges(text, ranges, 8, 77)["sequence"] == Range.fixed(77)


SKIPS = {"layers_per_block": 2, "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768}


def test_residuals_follow_the_down_blocks_of_the_unet() -> None:
    from diffusers import UNet2DConditionModel

    contract = unet_contract(UNET | SKIPS, "fp16", Extras(residuals=True))
    names = [spec.name for spec in contract.inputs[3:]]
    assert names == [*(f"down_block_additional_residuals.{index}" for index in range(12)),
                     "mid_block_additional_residual"]  # fmt: skip
    widths = [spec.axes[1] for spec in contract.inputs[3:]]
    assert widths == [320] * 4 + [640] * 3 + [1280] * 6  # as SD 1.5's ControlNet gives them
    assert contract.inputs[-1].axes == ("batch", 1280, "height_8", "width_8")
    ranges = ShapeRanges(Range(1, 1, 2), Range(512, 512, 768), Range.fixed(512), Range.fixed(77))
    assert axis_ranges(contract, ranges, 8)["height_8"] == Range(8, 8, 12)
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, **SKIPS)
    assert len(unet.up_blocks) * 3 == 12  # one skip connection for each ResNet of the up blocks


def test_hidden_states_are_outputs_when_asked_for() -> None:
    config = {"hidden_size": 768, "num_hidden_layers": 12}
    contract = component_contract("text_encoder", config, "fp32", Extras(hidden_states=True))
    assert [spec.name for spec in contract.outputs[2:]] == [f"hidden_states.{index}" for index in range(13)]


def test_sizes_follow_the_models_levels() -> None:
    assert vae_scale(VAE) == 8
    assert size_multiple(UNET, VAE) == 64
    assert size_multiple(UNET | {"block_out_channels": [320, 640, 1280]}, VAE) == 32


def test_height_500_names_the_nearest_sizes() -> None:
    with pytest.raises(InputError, match=r"height 500 is not a multiple of 64 pixels.*use 448 or 512"):
        check_size(500, 512, 64)


def test_shape_ranges_survive_json() -> None:
    ranges = ShapeRanges(Range(1, 1, 4), Range(64, 64, 128), Range.fixed(64), Range.fixed(77))
    assert ShapeRanges.from_json(ranges.to_json()) == ranges
