"""Shape ranges: defaults from the configs, what people type, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from graph_bundles import CONFIGS, graph_bundle

from export.build.ranges import (
    Geometry,
    Typed,
    check_sizes,
    default_ranges,
    input_shapes,
    max_tokens,
    other_sizes,
    to_ranges,
)
from sdkd.bundle.manifest import Bundle
from sdkd.core.contract import component_contract
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.errors import BundleError, InputError

STABLE_DIFFUSION = {
    "unet": CONFIGS["unet"] | {"sample_size": 64, "block_out_channels": [320, 640, 1280, 1280]},
    "vae_decoder": CONFIGS["vae_decoder"] | {"block_out_channels": [128, 256, 512, 512]},
}
GEOMETRY = Geometry(scale=8, multiple=64, positions=77)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle with the configs of Stable Diffusion 1.5."""
    made = graph_bundle(tmp_path / "bundle")
    for name, config in STABLE_DIFFUSION.items():
        (made.path / name / "config.json").write_text(json.dumps(config))
    return made


def test_default_is_the_native_size_and_up_to_four_images(bundle: Bundle) -> None:
    expected = ShapeRanges(Range(1, 1, 4), Range.fixed(512), Range.fixed(512), Range.fixed(77))
    assert default_ranges(bundle) == expected
    assert to_ranges(Typed(), bundle) == expected


def test_native_size_may_differ_by_side(bundle: Bundle) -> None:
    config = STABLE_DIFFUSION["unet"] | {"sample_size": [64, 96]}
    (bundle.path / "unet" / "config.json").write_text(json.dumps(config))
    assert (default_ranges(bundle).height.opt, default_ranges(bundle).width.opt) == (512, 768)


@pytest.mark.parametrize(
    ("sizes", "height", "width"),
    [
        (["512"], Range(512, 512, 512), Range(512, 512, 512)),
        (["512..768"], Range(512, 512, 768), Range(512, 512, 768)),
        (["512x768"], Range(512, 512, 512), Range(768, 768, 768)),
        (["512..1024x768"], Range(512, 512, 1024), Range(768, 768, 768)),
        (["512..640..768"], Range(512, 640, 768), Range(512, 640, 768)),
        (["640", "512..768"], Range(512, 640, 768), Range(512, 640, 768)),
        (["512", "512x768"], Range(512, 512, 512), Range(512, 512, 768)),
    ],
)
def test_sizes_as_people_type_them(bundle: Bundle, sizes: list[str], height: Range, width: Range) -> None:
    ranges = to_ranges(Typed(tuple(sizes), batch="1..2"), bundle)
    assert (ranges.height, ranges.width) == (height, width)
    assert ranges.batch == Range(1, 1, 2)


@pytest.mark.parametrize(
    ("sizes", "batch", "tokens", "message"),
    [
        (["500"], None, None, r"height 500 is not a multiple of 64 pixels.*use 448 or 512"),
        (["512x500"], None, None, r"width 500 is not a multiple of 64"),
        (["512..800"], None, None, r"height 800 is not a multiple of 64"),
        (["8"], None, None, r"height 8 is not a multiple of 64.*use 64 or 128"),
        (["512x512x3"], None, None, r"size '512x512x3' is not understood: give 512, 512..768 or 512x768"),
        (["big"], None, None, r"range 'big' is not understood"),
        (["768..512"], None, None, r"range 768..768..512 is not ordered"),
        ([], "0", None, r"range 0..0..0 is not ordered"),
        ([], "many", None, r"range 'many' is not understood"),
        ([], None, "77..200", r"77..200 tokens: this text encoder has 77 positions.*such as --tokens 77..231"),
    ],
)
def test_refused(bundle: Bundle, sizes: list[str], batch: str | None, tokens: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_ranges(Typed(tuple(sizes), batch=batch, tokens=tokens), bundle)


def test_prompts_of_several_parts(bundle: Bundle) -> None:
    assert to_ranges(Typed(tokens="77..231"), bundle).sequence == Range(77, 77, 231)


def test_a_three_level_student_takes_smaller_steps() -> None:
    check_sizes(Range(96, 96, 160), Range.fixed(32), 32)
    with pytest.raises(InputError, match="height 80 is not a multiple of 32 pixels"):
        check_sizes(Range.fixed(80), Range.fixed(32), 32)


def test_prompt_length_without_a_text_encoder(bundle: Bundle) -> None:
    (bundle.path / "text_encoder" / "config.json").unlink()
    with pytest.raises(BundleError, match=r"neither text_encoder/config.json nor tokenizer"):
        max_tokens(bundle)
    (bundle.path / "tokenizer").mkdir()
    (bundle.path / "tokenizer" / "tokenizer_config.json").write_text('{"model_max_length": 77}')
    assert max_tokens(bundle) == 77


def test_shapes_for_a_builder_cover_both_halves_of_guidance() -> None:
    ranges = ShapeRanges(Range(1, 1, 4), Range(512, 512, 768), Range.fixed(512), Range.fixed(77))
    contract = component_contract("unet", CONFIGS["unet"], "fp16")
    assert input_shapes(contract, ranges, GEOMETRY) == {
        "sample": ((1, 4, 64, 64), (2, 4, 64, 64), (8, 4, 96, 64)),
        "timestep": ((), (), ()),
        "encoder_hidden_states": ((1, 77, 32), (2, 77, 32), (8, 77, 32)),
    }
    encoder = component_contract("vae_encoder", CONFIGS["vae_encoder"], "fp16")
    assert input_shapes(encoder, ranges, GEOMETRY) == {"sample": ((1, 3, 512, 512), (1, 3, 512, 512), (4, 3, 768, 512))}


def test_second_shape_of_the_check_is_the_nearest_other_one() -> None:
    unet, decoder = (component_contract(name, CONFIGS[name], "fp32") for name in ("unet", "vae_decoder"))
    ranged = ShapeRanges(Range(1, 1, 4), Range(512, 512, 768), Range.fixed(512), Range.fixed(77))
    assert decoder.inputs[0].shape(other_sizes(decoder, ranged, GEOMETRY) or {}) == (2, 4, 72, 64)
    assert unet.inputs[0].shape(other_sizes(unet, ranged, GEOMETRY) or {}) == (1, 4, 72, 64)
    fixed = ShapeRanges(Range.fixed(1), Range.fixed(512), Range.fixed(512), Range.fixed(77))
    assert other_sizes(decoder, fixed, GEOMETRY) is None
    assert unet.inputs[0].shape(other_sizes(unet, fixed, GEOMETRY) or {}) == (1, 4, 64, 64)  # guidance off
