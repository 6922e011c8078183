"""Shape ranges and profiles: defaults from the configs, what people type, what is refused, built and recorded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from graph_bundles import CONFIGS, graph_bundle

from export import build_engine
from export.build.estimate import estimate
from export.build.ranges import (
    Geometry,
    Typed,
    check_shapes,
    check_sizes,
    cover,
    default_ranges,
    input_shapes,
    max_tokens,
    other_sizes,
    parse_profile,
    parse_profiles,
    to_ranges,
)
from export.build.request import requests_for
from sdkd.bundle.manifest import Bundle, Manifest
from sdkd.bundle.memory import largest_tensor
from sdkd.core.components import component_contract
from sdkd.core.profiles import Range, ShapeRanges, static_contract
from sdkd.errors import BundleError, InputError
from sdkd.targets.plan import plan_for_model

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
    assert default_ranges(bundle) == to_ranges(Typed(), bundle) == expected
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


# Several profiles

SMALL = ShapeRanges(Range(1, 1, 4), Range.fixed(32), Range.fixed(32), Range.fixed(77))
LARGE = ShapeRanges(Range.fixed(1), Range(64, 96, 128), Range(64, 64, 128), Range.fixed(77))
BOTH = ShapeRanges(Range(1, 1, 4), Range(32, 32, 128), Range(32, 32, 128), Range.fixed(77))


@pytest.fixture
def small(tmp_path: Path) -> Bundle:
    """A fresh fp32 bundle of small graphs."""
    return graph_bundle(tmp_path / "small")


def _typed(*sizes: str, **others: str) -> Typed:
    return Typed(sizes, **others)


@pytest.mark.parametrize(
    ("typed", "height", "width", "batch"),
    [
        (_typed("32..128", size_opt="64"), Range(32, 64, 128), Range(32, 64, 128), Range(1, 1, 4)),
        (_typed("32..128", size_opt="64x96"), Range(32, 64, 128), Range(32, 96, 128), Range(1, 1, 4)),
        (_typed("32", batch="1..4", batch_opt="2"), Range.fixed(32), Range.fixed(32), Range(1, 2, 4)),
        (_typed(batch="2"), Range.fixed(32), Range.fixed(32), Range.fixed(2)),
    ],
)
def test_best_sizes_are_named(small: Bundle, typed: Typed, height: Range, width: Range, batch: Range) -> None:
    (found,) = parse_profiles([], typed, small)
    assert (found.height, found.width, found.batch, found.sequence) == (height, width, batch, Range.fixed(77))


def test_profiles_take_from_the_options_what_they_leave_out(small: Bundle) -> None:
    outside = _typed("64..128", size_opt="96", batch="1..2", tokens="77..154")
    texts = ["size=32, batch=1..4", "size-opt=64", "size=32..64,tokens=77"]
    first, second, third = parse_profiles(texts, outside, small)
    assert first == ShapeRanges(Range(1, 1, 4), Range.fixed(32), Range.fixed(32), Range(77, 77, 154))
    assert second == ShapeRanges(Range(1, 1, 2), Range(64, 64, 128), Range(64, 64, 128), Range(77, 77, 154))
    assert third == ShapeRanges(Range(1, 1, 2), Range(32, 32, 64), Range(32, 32, 64), Range.fixed(77))
    assert len(parse_profiles(["size=32", "size=32", "size=64"], Typed(), small)) == 2


@pytest.mark.parametrize(
    ("texts", "outside", "message"),
    [
        (["siez=32"], Typed(), r"profile 'siez=32' is not understood at 'siez=32': give each of size, size-opt, batch"),
        (["size=32,size=64"], Typed(), r"not understood at 'size=64': give each of .* at most once, as in --profile"),
        (["size"], Typed(), r"profile 'size' is not understood at 'size'"),
        (["size=32,,"], Typed(), r"not understood at ''"),
        (["size=32..64,size-opt=128"], Typed(), r"--size-opt 128 is not one height within 32\.\.64: the best"),
        ([], _typed("32..64", size_opt="32..64"), r"--size-opt 32\.\.64 is not one height within 32\.\.64"),
        ([], _typed("32x64", size_opt="32"), r"--size-opt 32 is not one width within 64"),
        ([], _typed(batch="1..4", batch_opt="8"), r"--batch-opt 8 is not one batch within 1\.\.4"),
        ([], _typed(size_opt="32"), r"--size-opt 32 is the best of a range: give the range too, with --size"),
        ([], _typed(batch_opt="2"), r"--batch-opt 2 is the best of a range: give the range too, with --batch"),
        ([], _typed("32..128", size_opt="65"), r"height 65 is not a multiple of 4 pixels"),
        (["size=32", "size=501"], Typed(), r"height 501 is not a multiple of 4 pixels"),
    ],
)  # fmt: skip
def test_refused_profiles(small: Bundle, texts: list[str], outside: Typed, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_profiles(texts, outside, small)


def test_one_range_covers_them(small: Bundle) -> None:
    assert cover((SMALL, LARGE)) == BOTH
    assert cover((LARGE, SMALL)).height == Range(32, 96, 128)
    assert parse_profile("batch=2") == Typed(batch="2")
    contract = small.component("vae_decoder").contract  # every best size is checked, once
    shapes = check_shapes(contract, (SMALL, LARGE, SMALL), Geometry.of(small))
    assert [contract.inputs[0].shape(sizes) for sizes in shapes] == [(1, 4, 16, 16), (2, 4, 16, 16), (1, 4, 48, 32)]


def test_a_target_without_profiles_gets_one_range_and_says_so(small: Bundle) -> None:
    said: list[str] = []
    result = build_engine(
        small, "openvino", ranges=[SMALL, LARGE], components=["unet"], progress=lambda text, _: said.append(text)
    )
    assert said[0] == f"openvino has no profiles: one range covers all 2, {BOTH}"
    assert result.engine("openvino", "unet").ranges == BOTH
    assert result.engine("openvino", "unet").profiles == (BOTH,)


def test_tensorrt_gets_them_all(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = graph_bundle(tmp_path / "bundle", "fp16")

    def said(*profiles: ShapeRanges) -> str:
        """The first message of a build, which goes no further than that."""

        def hear(text: str, fraction: float | None) -> None:
            raise RuntimeError(text)

        with pytest.raises(RuntimeError, match="unet: ") as error:
            build_engine(bundle, "tensorrt-rtx", ranges=profiles, components=["unet"], progress=hear)
        return str(error.value)

    build_engine(bundle, "tensorrt-rtx", ranges=[SMALL, LARGE], components=["unet"])
    manifest = Bundle.open(bundle.path).manifest
    record = manifest.engines["tensorrt-rtx/unet"]
    assert (record.ranges, record.profiles) == (BOTH, (SMALL, LARGE))
    assert said(SMALL, LARGE) == "unet: tensorrt-rtx engine is fresh, reused"
    assert f"built for {SMALL} and {LARGE}, asked for {BOTH}" in said(BOTH)  # the same cover is not the same engine
    data = json.loads(json.dumps(manifest.to_json()))
    del data["engines"]["tensorrt-rtx/unet"]["profiles"]  # as older manifests are
    assert Manifest.from_json(data).engines["tensorrt-rtx/unet"].profiles == (BOTH,)


# Exports with fixed shapes

FIXED = ShapeRanges(Range.fixed(1), Range.fixed(32), Range.fixed(64), Range.fixed(77))


@pytest.fixture
def fixed(tmp_path: Path) -> Bundle:
    """A bundle whose UNet says that its shapes are fixed."""
    bundle = graph_bundle(tmp_path / "bundle")
    record = bundle.component("unet")
    changed = replace(
        record, contract=static_contract(record.contract, FIXED, 2, 77), details={"static": FIXED.to_json()}
    )
    components = {**bundle.manifest.components, "unet": changed}
    return replace(bundle, manifest=replace(bundle.manifest, components=components))


def test_fixed_shapes_are_the_default_and_the_only_ones(fixed: Bundle) -> None:
    assert default_ranges(fixed) == FIXED
    assert to_ranges(Typed(("32x64",), batch="1"), fixed) == FIXED
    with pytest.raises(
        InputError,
        match=r"was exported for fixed shapes, batch 1, height 32 px, width 64 px, 77 tokens, and not for batch 1\.\.4"
        r", height 32 px, .*: leave the shapes out, or export it again without --static",
    ):
        to_ranges(Typed(("32x64",), batch="1..4"), fixed)


def test_fixed_shapes_are_estimated_too(fixed: Bundle) -> None:
    (request,) = requests_for(fixed, plan_for_model("onnxruntime"), None, ["unet"])
    sizes = {"batch": 2, "height": 16, "width": 32}
    scores = largest_tensor("unet", CONFIGS["unet"], sizes, fused=False).elements
    assert scores == 2 * 8 * 512**2
    assert estimate(fixed, request).host == 300_000_000 + 3 * request.component.total_bytes + 8 * scores
