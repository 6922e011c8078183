"""IP-Adapters on engines: images as prompts draw what they draw eagerly, at every scale, without a rebuild."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import agree, differ, draw
from engine_bundles import RANGES
from made_once import made_once
from PIL import Image
from small_exports import small_bundle, small_pipeline
from small_ip_adapter import HIDDEN, TOKENS, WIDTH, image_encoder, ip_adapter, prompted, write
from small_sdxl import sdxl_bundle, sdxl_pipeline

from engines import load_pipeline, plug, unplug
from export import build_engine, export_pipeline
from export.build.calibrate import check_recorded
from sdkd.bundle.manifest import Bundle
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.errors import BundleError, EngineError, ModelError, RangeError
from sdkd.models.bundle_modules import module_of

SDXL_RANGES = ShapeRanges(Range(1, 1, 2), Range(16, 32, 32), Range(16, 32, 32), Range.fixed(77))


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (28, 28, 3), dtype=np.uint8))


def embedding(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def small() -> Any:
    """The small pipeline with an IP-Adapter."""
    pipe = small_pipeline()
    return prompted(pipe, ip_adapter(pipe.unet))


@pytest.fixture(scope="module")
def bundle() -> Path:
    """Its bundle, with engines; read it, do not change it."""

    def make(path: Path) -> None:
        pipe = small()
        before = dict(pipe.unet.attn_processors)
        export_pipeline(pipe, path, reuse=[small_bundle().path])
        assert pipe.unet.attn_processors == before
        for target in ("onnxruntime", "openvino"):
            build_engine(path, target, ranges=RANGES)

    return made_once("ip-adapter", make)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_an_image_is_a_prompt_at_any_scale(bundle: Path, target: str) -> None:
    pipe, eager = small(), small()
    for each in (pipe, eager):
        each.set_ip_adapter_scale(0.5)
    plug(pipe, bundle, target)
    images: dict[str, Any] = {"ip_adapter_image": picture(0)}
    expected = draw(eager, **images)
    agree(draw(pipe, **images), expected)  # the scale that it had
    for scale in (1.0, 0.0):
        for each in (pipe, eager):
            each.set_ip_adapter_scale(scale)
        other = draw(eager, **images)
        agree(draw(pipe, **images), other)
        differ(other, expected)


def test_several_images_and_several_latents(bundle: Path) -> None:
    pipe, eager = plug(small(), bundle, "onnxruntime"), small()
    options: dict[str, Any] = {"ip_adapter_image": [[picture(0), picture(1)]], "num_images_per_prompt": 2}
    expected = draw(eager, **options)
    agree(draw(pipe, **options), expected)
    differ(expected, draw(eager, **options | {"ip_adapter_image": [[picture(0)]]}))
    with pytest.raises(RangeError, match=r"takes 1 to 8 images of an IP-Adapter, not 9"):
        draw(pipe, ip_adapter_image=[[picture(number) for number in range(9)]])


def test_from_the_bundle_alone(bundle: Path) -> None:
    pipe, eager = load_pipeline(bundle, "onnxruntime"), small()
    assert pipe.image_encoder is None
    agree(draw(pipe), draw(small_pipeline()))  # no image: the plain UNet
    embeddings = {"ip_adapter_image_embeds": [embedding(2, 1, WIDTH)]}
    agree(draw(pipe, **embeddings), draw(eager, **embeddings))
    pipe.register_modules(image_encoder=eager.image_encoder, feature_extractor=eager.feature_extractor)
    agree(draw(pipe, ip_adapter_image=picture(3)), draw(eager, ip_adapter_image=picture(3)))
    unet = module_of(Bundle.open(bundle), "unet")
    assert torch.equal(unet.conv_in.weight, small_pipeline().unet.conv_in.weight)
    with pytest.raises(BundleError, match=r"takes embeddings of images, and the scales, which no calibration has"):
        check_recorded(Bundle.open(bundle))


def test_scales_stay_when_the_engine_goes(bundle: Path) -> None:
    pipe = small()
    plug(pipe, bundle, "onnxruntime", keep_eager=True, eager_fallback=True)
    pipe.set_ip_adapter_scale(0.25)
    large: dict[str, Any] = {"ip_adapter_image": picture(0), "height": 96, "width": 96}
    found = draw(pipe, **large)  # beyond what the engine was built for
    unplug(pipe)
    assert {tuple(each.scale) for each in pipe.unet.attn_processors.values() if hasattr(each, "scale")} == {(0.25,)}
    agree(found, draw(pipe, **large))


def test_what_does_not_fit(bundle: Path, engine_bundle: Path) -> None:
    with pytest.raises(ModelError, match=rf"has IP-Adapters that read .* width {WIDTH} .* and this pipeline no IP-Ada"):
        plug(small_pipeline(), bundle, "onnxruntime")
    with pytest.raises(ModelError, match=r"no IP-Adapter in its UNet and this pipeline .* --ip-adapter FILE"):
        plug(small(), engine_bundle, "onnxruntime")
    pipe = small_pipeline()
    with pytest.raises(ModelError, match=r"other weights than unet .*layers\.0\.image_embeds\.weight differs"):
        plug(prompted(pipe, ip_adapter(pipe.unet, seed=1)), bundle, "onnxruntime")
    loaded = load_pipeline(bundle, "onnxruntime")
    call = (torch.zeros(2, 4, 16, 16), 5, torch.zeros(2, 77, 32))
    with pytest.raises(EngineError, match=rf"shapes \(batch, images, {WIDTH}\), one for each.* not \(2, 1, 3\)"):
        loaded.unet(*call, added_cond_kwargs={"image_embeds": [torch.zeros(2, 1, 3)]})
    with pytest.raises(EngineError, match=r"ip_adapter_masks'\]: .* an IP-Adapter's masks are not exported"):
        loaded.unet(*call, cross_attention_kwargs={"ip_adapter_masks": [torch.zeros(1, 1, 8, 8)]})
    with pytest.raises(EngineError, match=r"'_load_ip_adapter_weights': IP-Adapters are part of the graph: .*--ip-ad"):
        prompted(loaded, ip_adapter(small_pipeline().unet))
    with pytest.raises(EngineError, match=r"keeps its IP-Adapters: without an image it draws as if there were none"):
        loaded.unload_ip_adapter()
    loaded.set_ip_adapter_scale([[0.5, 0.7]])
    with pytest.raises(EngineError, match=r"a list of scales for one IP-Adapter goes with masks"):
        loaded.unet(*call, added_cond_kwargs={"image_embeds": [torch.zeros(2, 1, WIDTH)]})


@pytest.mark.slow
def test_two_adapters_from_files_beside_sdxl(tmp_path: Path) -> None:
    pipe = sdxl_pipeline()
    states = [ip_adapter(pipe.unet, kind, seed) for seed, kind in enumerate(("plain", "plus"))]
    files = [write(state, tmp_path / f"{number}.safetensors") for number, state in enumerate(states)]
    pipe.register_modules(image_encoder=image_encoder())  # says how many hidden states there are
    made = export_pipeline(pipe, tmp_path / "bundle", ip_adapters=files, reuse=[sdxl_bundle().path])
    assert pipe.unet.encoder_hid_proj is None
    assert [Path(row["file"]) for row in made.manifest.source["ip_adapters"]] == files
    assert made.component("unet").source_sha256 != sdxl_bundle().component("unet").source_sha256
    build_engine(made.path, "onnxruntime", ranges=SDXL_RANGES)
    eager = prompted(sdxl_pipeline(), *states)
    plugged = plug(prompted(sdxl_pipeline(), *states), made.path, "onnxruntime")
    options: dict[str, Any] = {"height": 32, "width": 32, "ip_adapter_image": [[picture(0), picture(1)], picture(2)]}
    for scale in ([1.0, 0.4], [0.0, {"down": {"block_2": 0.8}}]):
        for each in (plugged, eager):
            each.set_ip_adapter_scale(scale)
        agree(draw(plugged, **options), draw(eager, **options))
    options["ip_adapter_image_embeds"] = [embedding(2, 2, WIDTH), embedding(2, 3, TOKENS, HIDDEN)]
    del options["ip_adapter_image"]
    agree(draw(plugged, **options), draw(eager, **options))  # two images and three
