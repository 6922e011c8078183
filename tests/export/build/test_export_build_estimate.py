"""What a build will take: real Stable Diffusion sizes, and refusals before anything is built."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from graph_bundles import CONFIGS, graph_bundle

from export import build_engine
from export.build.estimate import LARGEST_VOLUME, check_volume, estimate
from export.build.ranges import Typed, to_ranges
from export.build.request import Request, plan_for, requests_for
from sdkd.bundle.manifest import Bundle
from sdkd.bundle.memory import Largest, free_memory, largest_tensor
from sdkd.core.contract import Precision
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.errors import BuildError, InputError

UNET = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "attention_head_dim": 8,
}
VAE = {"block_out_channels": [128, 256, 512, 512]}


def _sizes(pixels: int, batch: int = 2) -> dict[str, int]:
    return {"batch": batch, "height": pixels // 8, "width": pixels // 8, "sequence": 77}


@pytest.mark.parametrize(
    ("component", "config", "pixels", "fused", "what", "elements"),
    [
        ("unet", UNET, 512, False, "attention scores of level 1", 2 * 8 * 4096**2),
        ("unet", UNET, 512, True, "feed-forward of level 1", 2 * 4096 * 8 * 320),
        ("unet", UNET, 1024, False, "attention scores of level 1", 2 * 8 * 16384**2),
        ("unet", UNET | {"attention_head_dim": [32, 10, 20, 20]}, 512, True, "attention scores of level 1", 2**30),
        ("vae_decoder", VAE, 512, True, "features of the image's size", 2 * 256 * 512**2),
        ("vae_decoder", VAE, 1024, True, "features of the image's size", 2 * 256 * 1024**2),
        ("vae_decoder", VAE, 2048, True, "attention scores", 2 * 65536**2),
        ("vae_encoder", {"decoder_block_out_channels": [64] * 4}, 2048, True, "features of the image's size", 2**29),
        ("text_encoder", {"hidden_size": 768}, 512, True, "feed-forward", 2 * 77 * 4 * 768),
    ],
)
def test_largest_tensor(
    component: str, config: dict[str, Any], pixels: int, fused: bool, what: str, elements: int
) -> None:
    assert largest_tensor(component, config, _sizes(pixels), fused) == Largest(what, elements)


def test_a_graph_without_attention_nodes_writes_its_scores() -> None:
    assert largest_tensor("unet", UNET, _sizes(512), True, opset=18).what == "attention scores of level 1"
    assert largest_tensor("unet", UNET, _sizes(1024), True, opset=18).elements > LARGEST_VOLUME


def test_an_encoder_is_asked_in_pixels() -> None:
    sizes = {"batch": 1, "image_height": 512, "image_width": 512}
    assert largest_tensor("vae_encoder", VAE, sizes, True).elements == 256 * 512**2


def _stable_diffusion(folder: Path, precision: Precision) -> Bundle:
    """A bundle with the configs of Stable Diffusion 1.5, whose graphs are small."""
    bundle = graph_bundle(folder, precision)
    configs = {"unet": CONFIGS["unet"] | UNET | {"sample_size": 64}, "vae_decoder": CONFIGS["vae_decoder"] | VAE}
    for name, config in configs.items():
        (bundle.path / name / "config.json").write_text(json.dumps(config))
    return bundle


def _request(bundle: Bundle, target: str, precision: str, component: str, *sizes: str, batch: str = "1") -> Request:
    ranges = [to_ranges(Typed((size,), batch=batch), bundle) for size in sizes]
    return requests_for(bundle, plan_for(bundle, target, precision), ranges, [component])[0]


def test_1024_px_fits_in_half_precision_and_not_in_float(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    whole = _stable_diffusion(tmp_path / "whole", "fp32")
    with pytest.raises(
        InputError,
        match=r"unet at batch 1, 1024x1024 px has attention scores of level 1 of 4,294,967,296 elements, and "
        r"tensorrt-rtx can have 2,147,483,647 in a tensor: narrow --size or --batch, or export in fp16",
    ):
        build_engine(whole, "tensorrt-rtx", precision="fp32", ranges=to_ranges(Typed(("1024",), batch="1"), whole))
    assert not (whole.path / "engines").exists()
    check_volume(whole, _request(whole, "onnxruntime", "fp32", "unet", "1024"))  # counts further than TensorRT


def test_only_the_profile_that_is_too_large_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    half = _stable_diffusion(tmp_path / "half", "fp16")
    with pytest.raises(
        InputError, match=r"vae_decoder at batch 9, 1024x1024 px has features of the image's size of 2,4"
    ):
        check_volume(half, _request(half, "tensorrt-rtx", "fp16", "vae_decoder", "512", "1024", batch="9"))


def test_attention_that_was_taken_apart_writes_its_scores(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    half = _stable_diffusion(tmp_path / "half", "fp16")
    request = _request(half, "tensorrt-rtx", "fp16", "unet", "1024")
    whole, apart = (
        replace(request, component=replace(request.component, opset=23, details={"operators": {kind: 32}}))
        for kind in ("Attention", "Softmax")
    )
    check_volume(half, whole)
    with pytest.raises(InputError, match=r"attention scores of level 1 of 4,294,967,296 elements"):
        check_volume(half, apart)


def test_the_formula(tmp_path: Path) -> None:
    bundle = _stable_diffusion(tmp_path / "bundle", "fp32")
    record = bundle.component("unet")
    small, large = (_request(bundle, "onnxruntime", "fp32", "unet", size) for size in ("512", "512..768..768"))
    at_512 = 2 * 8 * 4096**2
    assert estimate(bundle, small).host == 300_000_000 + 3 * record.total_bytes + 2 * 4 * at_512
    assert estimate(bundle, large).host > estimate(bundle, small).host  # compared at its best size
    assert estimate(bundle, small).gpu == 0
    assert estimate(bundle, small).disk == record.total_bytes


def test_what_does_not_fit_in_memory_is_refused(tmp_path: Path) -> None:
    bundle = _stable_diffusion(tmp_path / "bundle", "fp32")
    huge = ShapeRanges(Range.fixed(64), Range.fixed(2048), Range.fixed(2048), Range.fixed(77))
    with pytest.raises(
        BuildError,
        match=r"the builds, unet most of all, need about 35,18\d\.\d GB of memory, and [\d.]+ GB are free: close other",
    ):
        build_engine(bundle, "onnxruntime", ranges=huge, components=["unet"])
    assert not (bundle.path / "engines").exists()


def test_the_cap_is_what_is_free() -> None:
    assert free_memory(1 << 29) == 1 << 29
    assert (1 << 29) < free_memory() < 1 << 50
