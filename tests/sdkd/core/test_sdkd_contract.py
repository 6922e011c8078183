"""What each component looks like from outside, and the ranges of sizes that engines are built for."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from sdkd.core.components import component_contract, unet_contract
from sdkd.core.conditions import Extras
from sdkd.core.contract import Contract, check_engine_precision, check_precision, check_size, size_multiple, vae_scale
from sdkd.core.profiles import Range, ShapeRanges, axis_ranges
from sdkd.errors import InputError, ModelError

UNET = {"in_channels": 9, "out_channels": 4, "cross_attention_dim": 768, "block_out_channels": [320, 640, 1280, 1280]}
VAE = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [128, 256, 512, 512]}
TEXT = {"hidden_size": 768, "num_hidden_layers": 12}
SKIPS = {"layers_per_block": 2, "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768}


def test_unet_contract_takes_every_size_from_the_config() -> None:
    contract = unet_contract(UNET, "fp16")
    assert [(spec.name, spec.dtype, spec.axes) for spec in (*contract.inputs, *contract.outputs)] == [
        ("sample", "float16", ("batch", 9, "height", "width")),
        ("timestep", "float32", ()),
        ("encoder_hidden_states", "float16", ("batch", "sequence", 768)),
        ("out_sample", "float16", ("batch", 4, "height", "width")),
    ]
    assert contract.axis_names() == ("batch", "height", "width", "sequence")
    assert contract.inputs[0].shape({"batch": 2, "height": 64, "width": 96}) == (2, 9, 64, 96)


def test_contracts_and_ranges_survive_json() -> None:
    for component in ("unet", "vae_decoder", "vae_encoder", "text_encoder"):
        contract = component_contract(component, UNET | VAE | TEXT | {"in_channels": 3}, "bf16")
        assert Contract.from_json(contract.to_json()) == contract
    ranges = ShapeRanges(Range(1, 1, 4), Range(64, 64, 128), Range.fixed(64), Range.fixed(77))
    assert ShapeRanges.from_json(ranges.to_json()) == ranges


def test_what_is_unknown_is_refused() -> None:
    with pytest.raises(InputError, match=r"'adapter' is unknown: choose from text_encoder, text_encoder_2, unet"):
        component_contract("adapter", {}, "fp32")
    with pytest.raises(ModelError, match=r"cross_attention_dim \[768, 1024\] is not one integer"):
        unet_contract(UNET | {"cross_attention_dim": [768, 1024]}, "fp32")
    with pytest.raises(InputError, match=r"precision 'half' is unknown: choose one of fp32, fp16, bf16$"):
        check_precision("half")


@pytest.mark.parametrize(
    ("name", "nearest"), [("int8", "int8"), ("fp8", "fp8"), ("int4", "int8"), ("NF4", "int8"), ("uint8", "int8")]
)
def test_few_bits_are_of_engines_alone(name: str, nearest: str) -> None:
    advice = f"export in fp32 or fp16, then sdkd build-engine BUNDLE .*{nearest}$"
    with pytest.raises(InputError, match=f"precision '{name}' is unknown: choose one of fp32, fp16, bf16; {advice}"):
        check_precision(name)
    if name == nearest:
        assert check_engine_precision(name) == name
        return
    choices = "choose one of fp32, fp16, bf16, int8, fp8; the nearest to it is int8$"
    with pytest.raises(InputError, match=f"precision '{name}' of an engine is unknown: {choices}"):
        check_engine_precision(name)
    with pytest.raises(InputError, match=r"height 500 is not a multiple of 64 pixels.*use 448 or 512"):
        check_size(500, 512, 64)
    with pytest.raises(InputError, match=r"range 4\.\.4\.\.1 is not ordered"):
        Range.parse("4..1")
    for text in ("", "512-768", "a..b", "1..2..3..4", "-1"):
        with pytest.raises(InputError, match=r"is not understood: give 512, 512\.\.768 or min\.\.opt\.\.max"):
            Range.parse(text)


def test_ranges_are_read() -> None:
    for text, expected in {
        "512": (512,) * 3,
        "512..768": (512, 512, 768),
        "1..2..4": (1, 2, 4),
        " 64 ": (64,) * 3,
    }.items():
        assert Range.parse(text) == Range(*expected)


def test_the_unet_batch_covers_all_copies_of_guidance() -> None:
    ranges = ShapeRanges(Range(1, 2, 4), Range(512, 512, 768), Range(512, 640, 768), Range(77, 77, 231))
    axes = axis_ranges(unet_contract(UNET, "fp32"), ranges, 8, 77)
    assert axes == {
        "batch": Range(1, 4, 8), "height": Range(64, 64, 96), "width": Range(64, 80, 96), "sequence": Range(77, 77, 231)
    }  # fmt: skip
    assert axis_ranges(component_contract("vae_decoder", VAE, "fp32"), ranges, 8)["batch"] == Range(1, 2, 4)
    assert axis_ranges(unet_contract(UNET | {"in_channels": 8}, "fp32"), ranges, 8)["batch"].max == 12  # pix2pix: 3
    embedded = unet_contract(UNET | {"time_cond_proj_dim": 256}, "fp16")
    assert (embedded.inputs[3].name, embedded.inputs[3].dtype) == ("timestep_cond", "float16")
    assert embedded.inputs[3].axes == ("batch", 256)
    assert axis_ranges(embedded, ranges, 8)["batch"] == Range(1, 2, 4)  # its scale is an input: nothing is stacked
    # Longer prompts reach the UNet, not the text encoder.
    assert axis_ranges(component_contract("text_encoder", TEXT, "fp32"), ranges, 8, 77)["sequence"] == Range.fixed(77)


def test_residuals_follow_the_down_blocks_of_the_unet() -> None:
    contract = unet_contract(UNET | SKIPS, "fp16", Extras(residuals=True))
    names = [f"down_block_additional_residuals.{index}" for index in range(12)]
    assert [spec.name for spec in contract.inputs[3:]] == [*names, "mid_block_additional_residual"]
    widths = [spec.axes[1] for spec in contract.inputs[3:]]
    assert widths == [320] * 4 + [640] * 3 + [1280] * 6  # as SD 1.5's ControlNet gives them
    assert contract.inputs[-1].axes == ("batch", 1280, "height_8", "width_8")
    ranges = ShapeRanges(Range(1, 1, 2), Range(512, 512, 768), Range.fixed(512), Range.fixed(77))
    assert axis_ranges(contract, ranges, 8)["height_8"] == Range(8, 8, 12)
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, **SKIPS)
    assert len(unet.up_blocks) * 3 == 12  # one skip connection for each ResNet of the up blocks


def test_hidden_states_are_outputs_when_asked_for() -> None:
    contract = component_contract("text_encoder", TEXT, "fp32", Extras(hidden_states=True))
    assert [spec.name for spec in contract.outputs[2:]] == [f"hidden_states.{index}" for index in range(13)]


def test_sizes_follow_the_models_levels() -> None:
    assert vae_scale(VAE) == 8
    assert size_multiple(UNET, VAE) == 64
    assert size_multiple(UNET | {"block_out_channels": [320, 640, 1280]}, VAE) == 32
