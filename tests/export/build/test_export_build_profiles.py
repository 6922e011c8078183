"""Several profiles in one engine: what people type, what is built, kept, recorded and shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from graph_bundles import graph_bundle

from export import build_engine
from export.build.ranges import Geometry, Typed, check_shapes, cover, parse_profile, parse_profiles
from sdkd.bundle.manifest import Bundle, Manifest
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.errors import InputError

SMALL = ShapeRanges(Range(1, 1, 4), Range.fixed(32), Range.fixed(32), Range.fixed(77))
LARGE = ShapeRanges(Range.fixed(1), Range(64, 96, 128), Range(64, 64, 128), Range.fixed(77))
BOTH = ShapeRanges(Range(1, 1, 4), Range(32, 32, 128), Range(32, 32, 128), Range.fixed(77))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A fresh fp32 bundle of small graphs."""
    return graph_bundle(tmp_path / "bundle")


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
def test_best_sizes_are_named(bundle: Bundle, typed: Typed, height: Range, width: Range, batch: Range) -> None:
    (found,) = parse_profiles([], typed, bundle)
    assert (found.height, found.width, found.batch, found.sequence) == (height, width, batch, Range.fixed(77))


def test_profiles_take_from_the_options_what_they_leave_out(bundle: Bundle) -> None:
    outside = _typed("64..128", size_opt="96", batch="1..2", tokens="77..154")
    texts = ["size=32, batch=1..4", "size-opt=64", "size=32..64,tokens=77"]
    first, second, third = parse_profiles(texts, outside, bundle)
    assert first == ShapeRanges(Range(1, 1, 4), Range.fixed(32), Range.fixed(32), Range(77, 77, 154))
    assert second == ShapeRanges(Range(1, 1, 2), Range(64, 64, 128), Range(64, 64, 128), Range(77, 77, 154))
    assert third == ShapeRanges(Range(1, 1, 2), Range(32, 32, 64), Range(32, 32, 64), Range.fixed(77))


def test_equal_profiles_are_one(bundle: Bundle) -> None:
    assert len(parse_profiles(["size=32", "size=32", "size=64"], Typed(), bundle)) == 2


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
def test_refused_profiles(bundle: Bundle, texts: list[str], outside: Typed, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_profiles(texts, outside, bundle)


def test_one_range_covers_them() -> None:
    assert cover((SMALL, LARGE)) == BOTH
    assert cover((LARGE, SMALL)).height == Range(32, 96, 128)
    assert parse_profile("batch=2") == Typed(batch="2")


def test_every_best_size_is_checked_once(bundle: Bundle) -> None:
    contract = bundle.component("vae_decoder").contract
    shapes = check_shapes(contract, (SMALL, LARGE, SMALL), Geometry.of(bundle))
    assert [contract.inputs[0].shape(sizes) for sizes in shapes] == [(1, 4, 16, 16), (2, 4, 16, 16), (1, 4, 48, 32)]


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_target_without_profiles_gets_one_range_and_says_so(bundle: Bundle, target: str) -> None:
    said: list[str] = []
    result = build_engine(
        bundle, target, ranges=[SMALL, LARGE], components=["unet"], progress=lambda text, _: said.append(text)
    )
    assert said[0] == f"{target} has no profiles: one range covers all 2, {BOTH}"
    assert result.engine(target, "unet").ranges == BOTH
    assert result.engine(target, "unet").profiles == (BOTH,)


def test_tensorrt_gets_them_all(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = graph_bundle(tmp_path / "bundle", "fp16")
    said: list[str] = []
    options: dict[str, Any] = {"components": ["unet"], "progress": lambda text, _: said.append(text)}
    first = build_engine(bundle, "tensorrt-rtx", ranges=[SMALL, LARGE], **options)
    record = Bundle.open(bundle.path).engine("tensorrt-rtx", "unet")
    assert (record.ranges, record.profiles) == (BOTH, (SMALL, LARGE))
    said.clear()
    assert build_engine(bundle, "tensorrt-rtx", ranges=(SMALL, LARGE), **options).manifest == first.manifest
    assert said == ["unet: tensorrt-rtx engine is fresh, reused"]
    said.clear()
    build_engine(bundle, "tensorrt-rtx", ranges=BOTH, **options)  # the same cover is not the same engine
    assert f"built for {SMALL} and {LARGE}, asked for {BOTH}" in said[0]


def test_records_without_profiles_have_one(bundle: Bundle) -> None:
    data = json.loads(json.dumps(build_engine(bundle, "onnxruntime", components=["unet"]).manifest.to_json()))
    del data["engines"]["onnxruntime/unet"]["profiles"]
    record = Manifest.from_json(data).engines["onnxruntime/unet"]
    assert record.profiles == (record.ranges,)
    assert record == Bundle.open(bundle.path).engine("onnxruntime", "unet")
