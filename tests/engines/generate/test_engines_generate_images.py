"""`sdkd generate` from images: image-to-image, inpainting, ControlNet, instruct-pix2pix; what is refused, and why."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from generate_runs import pixels, run
from helpers import fixed_weights
from PIL import Image
from small_bundles import UNET, small_controlnet, small_pipeline
from small_exports import tiny_vae

from engines.generate.image_inputs import read_inputs, resized
from sdkd.bundle.manifest import Bundle
from sdkd.errors import BundleError, EngineError, InputError

SETTINGS = ("--steps", 4, "--seed", 3)


def pipeline(kind: str = "StableDiffusionPipeline", channels: int = 4) -> Any:
    """The small pipeline as another class, with a UNet of so many channels."""
    parts = small_pipeline().components | {"requires_safety_checker": False, "controlnet": small_controlnet()}
    if channels != 4:
        parts["unet"] = fixed_weights(diffusers.UNet2DConditionModel(**(UNET | {"in_channels": channels})))
    found = getattr(diffusers, kind)
    taken = inspect.signature(found.__init__).parameters
    pipe = found(**{name: part for name, part in parts.items() if name in taken})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Pipeline folders by the channels of their UNet: text-to-image, instruct-pix2pix, inpainting."""
    home = tmp_path_factory.mktemp("models")
    kinds = {
        4: "StableDiffusionPipeline",
        8: "StableDiffusionInstructPix2PixPipeline",
        9: "StableDiffusionInpaintPipeline",
    }
    for channels, kind in kinds.items():
        pipeline(kind, channels).save_pretrained(home / str(channels))
    return {channels: home / str(channels) for channels in kinds}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An image, a mask and a control image of 32x32 pixels."""
    home = tmp_path_factory.mktemp("images")
    colours = np.random.default_rng(0).integers(0, 255, (2, 4, 4, 3), dtype=np.uint8)
    images = {name: Image.fromarray(colours[index]) for index, name in enumerate(("image", "control"))}
    images["mask"] = Image.fromarray(np.kron([[0, 255], [0, 255]], np.ones((16, 16))).astype(np.uint8))
    for name, image in images.items():
        image.resize((32, 32), Image.Resampling.BICUBIC if name != "mask" else None).save(home / f"{name}.png")
    return {name: home / f"{name}.png" for name in images}


def expected(kind: str, files: dict[str, Path], channels: int = 4, vae: Any = None, **call: Any) -> np.ndarray:
    """What diffusers' own class draws, with another VAE where one is given; what names a file gets its image."""
    modes = {"mask": "L"}
    given = {
        name: Image.open(files[value]).convert(modes.get(value, "RGB")) if isinstance(value, str) else value
        for name, value in call.items()
    }
    generator = torch.Generator().manual_seed(3)
    pipe = pipeline(kind, channels)
    pipe.vae = vae or pipe.vae
    image = pipe("a cat", num_inference_steps=4, generator=generator, **given).images[0]
    return np.asarray(image, dtype=np.float64)


def options(files: dict[str, Path], *names: str) -> list[object]:
    return [word for name in names for word in (f"--{name}", files[name])]


WITHOUT_CONTROL: list[tuple[str, int, tuple[str, ...], tuple[Any, ...], dict[str, Any]]] = [
    ("StableDiffusionImg2ImgPipeline", 4, ("image",), (), {"image": "image", "strength": 0.8}),
    ("StableDiffusionImg2ImgPipeline", 4, ("image",), ("--strength", 0.5), {"image": "image", "strength": 0.5}),
    ("StableDiffusionInpaintPipeline", 4, ("image", "mask"), (),
     {"image": "image", "mask_image": "mask", "strength": 1.0, "height": 32, "width": 32}),
    ("StableDiffusionInpaintPipeline", 9, ("image", "mask"), ("--strength", 0.75),
     {"image": "image", "mask_image": "mask", "strength": 0.75, "height": 32, "width": 32}),
    ("StableDiffusionInstructPix2PixPipeline", 8, ("image",), (), {"image": "image", "image_guidance_scale": 1.5}),
    ("StableDiffusionInstructPix2PixPipeline", 8, ("image",), ("--image-guidance-scale", 3),
     {"image": "image", "image_guidance_scale": 3.0}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "channels", "names", "words", "call"), WITHOUT_CONTROL)
def test_eager_models_draw_what_diffusers_draws(
    folders: dict[int, Path], files: dict[str, Path], tmp_path: Path, kind: str, channels: int,
    names: tuple[str, ...], words: tuple[Any, ...], call: dict[str, Any],
) -> None:  # fmt: skip
    out = tmp_path / "out.png"
    result = run(folders[channels], "a cat", "-o", out, *SETTINGS, *options(files, *names), *words)
    assert result.exit_code == 0, result.exception
    wanted = expected(kind, files, channels, guidance_scale=7.5, **call)
    assert np.array_equal(pixels(out), wanted)
    text = Image.open(out).text
    assert [text[name] for name in names] == [str(files[name]) for name in names]
    scales = {name: str(value) for name, value in call.items() if name in ("strength", "image_guidance_scale")}
    assert {name: text[name] for name in text if name in ("strength", "image_guidance_scale")} == scales


@pytest.mark.parametrize("row", [0, 2], ids=["image", "image and mask"])
def test_another_vae_encodes_and_decodes(
    folders: dict[int, Path], files: dict[str, Path], tmp_path: Path, row: int
) -> None:
    kind, _, names, _, call = WITHOUT_CONTROL[row]
    tiny_vae().save_pretrained(tmp_path / "vae")
    words = (*SETTINGS, *options(files, *names), "--vae", tmp_path / "vae")
    result = run(folders[4], "a cat", "-o", tmp_path / "out.png", *words)
    assert result.exit_code == 0, result.exception
    wanted = expected(kind, files, vae=tiny_vae(), guidance_scale=7.5, **call)
    assert np.array_equal(pixels(tmp_path / "out.png"), wanted)
    assert not np.array_equal(wanted, expected(kind, files, guidance_scale=7.5, **call))
    assert Image.open(tmp_path / "out.png").text["model"] == f"{folders[4]} --vae {tmp_path / 'vae'}"


@pytest.mark.parametrize("row", [0, 2], ids=["image", "image and mask"])
def test_engines_draw_the_same(engine_bundle: Path, files: dict[str, Path], tmp_path: Path, row: int) -> None:
    kind, _, names, words, call = WITHOUT_CONTROL[row]
    out = tmp_path / "out.png"
    result = run(engine_bundle, "a cat", "-o", out, *SETTINGS, *options(files, *names), *words)
    assert result.exit_code == 0, result.exception
    assert np.abs(pixels(out) - expected(kind, files, guidance_scale=7.5, **call)).max() <= 1


@pytest.mark.parametrize(
    ("kind", "names", "words", "call"),
    [
        ("StableDiffusionControlNetPipeline", ("control",), ("--control-scale", 0.3),
         {"image": "control", "controlnet_conditioning_scale": 0.3}),
        ("StableDiffusionControlNetImg2ImgPipeline", ("image", "control"), ("--strength", 0.5),
         {"image": "image", "control_image": "control", "strength": 0.5, "controlnet_conditioning_scale": 1.0}),
        ("StableDiffusionControlNetInpaintPipeline", ("image", "mask", "control"), (),
         {"image": "image", "mask_image": "mask", "control_image": "control", "strength": 1.0,
          "controlnet_conditioning_scale": 1.0}),
    ],
)  # fmt: skip
def test_a_bundle_with_a_controlnet_draws_what_diffusers_draws(
    control_bundle: Path, files: dict[str, Path], tmp_path: Path, kind: str, names: tuple[str, ...],
    words: tuple[Any, ...], call: dict[str, Any],
) -> None:  # fmt: skip
    out, target = tmp_path / "out.png", ("--target", "onnxruntime")
    result = run(control_bundle, "a cat", "-o", out, *SETTINGS, *options(files, *names), *words, *target)
    assert result.exit_code == 0, result.exception
    wanted = expected(kind, files, guidance_scale=7.5, height=32, width=32, **call)
    assert np.abs(pixels(out) - wanted).max() <= 1
    text = Image.open(out).text
    assert text["control_scale"] == str(call["controlnet_conditioning_scale"])
    assert text["target"] == "onnxruntime"


def test_a_folder_of_images_from_one_image(engine_bundle: Path, files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a dog\na cat\nsnow")
    words = ("--prompts", tmp_path / "list.txt", "-o", tmp_path / "out", "--steps", 4, "--seed", 2)
    for names in (("image",), ("image", "mask")):
        result = run(engine_bundle, *words, "--overwrite", "--strength", 0.5, *options(files, *names))
        assert result.exit_code == 0, result.exception
        assert "images 1 to 2 of 3" in result.output
        alone = tmp_path / "alone.png"
        run(engine_bundle, "a cat", "-o", alone, *SETTINGS, "--overwrite", "--strength", 0.5, *options(files, *names))
        assert np.abs(pixels(tmp_path / "out" / "00001.png") - pixels(alone)).max() <= 1


def test_images_take_the_size_that_is_asked_for(
    folders: dict[int, Path], files: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.png"
    words = ("--size", "64x32", "--image", files["image"])
    result = run(folders[4], "a cat", "-o", out, *SETTINGS, *words)
    assert result.exit_code == 0, result.exception
    assert Image.open(out).size == (32, 64)
    assert f"image {files['image']}: 32x32 px resized to 32x64 px (width x height)" in result.output.replace("\n", "")
    image = Image.open(files["image"]).convert("RGB").resize((32, 64), Image.Resampling.LANCZOS)
    call = {"num_inference_steps": 4, "strength": 0.8, "guidance_scale": 7.5}
    pipe, generator = pipeline("StableDiffusionImg2ImgPipeline"), torch.Generator().manual_seed(3)
    wanted = pipe("a cat", image=image, generator=generator, **call).images[0]
    assert np.array_equal(pixels(out), np.asarray(wanted, dtype=np.float64))


def test_images_are_read_as_they_are_meant(tmp_path: Path) -> None:
    strokes = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    strokes.putpixel((1, 0), (0, 0, 0, 255))
    strokes.save(tmp_path / "mask.png")
    depth = np.array([[0, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(depth).save(tmp_path / "depth.png")
    files = {"image": tmp_path / "mask.png", "mask": tmp_path / "mask.png", "control": tmp_path / "depth.png"}
    inputs = read_inputs(files, {})
    assert np.asarray(inputs.images["mask"]).tolist() == [[0, 255, 0]]
    assert np.asarray(inputs.images["control"]).tolist() == [[[0] * 3, [128] * 3, [255] * 3]]
    assert np.asarray(inputs.images["image"])[0].tolist() == [[255] * 3, [0] * 3, [255] * 3]
    assert resized(inputs, 1, 3) == (inputs, [])
    other, lines = resized(inputs, 8, 8)
    assert [made.size for made in other.images.values()] == [(8, 8)] * 3
    assert [line.split(": ")[1] for line in lines] == ["3x1 px resized to 8x8 px (width x height)"] * 3


REFUSED: list[tuple[int, tuple[str, ...], tuple[Any, ...], str]] = [
    (4, (), ("--image", "none.png"), r"image 'none\.png' is no file: give a PNG, JPEG"),
    (4, (), ("--image", "broken.png"), r"image 'broken\.png' cannot be read as an image \(.*\): save it again"),
    (4, (), ("--image", "cut.png"), r"image 'cut\.png' cannot be read as an image \(.*\): save it again"),
    (4, ("mask",), (), r"mask '.*mask\.png' has no image to act on: give --image FILE"),
    (4, ("control",), (), r"model '.*4' has no ControlNet: .*sdkd export .*4 artifacts/bundle --controlnet FOLDER"),
    (4, ("image",), ("--strength", 1.5), r"strength 1\.5 is not in 0\.\.1: give 0"),
    (4, ("image",), ("--strength", -0.5), r"strength -0\.5 is not in 0\.\.1"),
    (4, ("image",), ("--strength", 0.2), r"strength 0\.2 leaves none of 4 steps: give --strength 0\.25 or more"),
    (
        4,
        ("image",),
        ("--steps", 1),
        r"strength 0\.8 leaves none of 1 steps: give --strength 1 or more, or more --steps",
    ),
    (4, (), ("--strength", 0.5), r"--strength 0\.5 has nothing to act on here: .* give --image FILE, or leave it out"),
    (4, ("image",), ("--control-scale", 0.5), r"--control-scale 0\.5 has nothing to act on here: .*--control FILE"),
    (4, ("image",), ("--image-guidance-scale", 2), r"--image-guidance-scale 2 has nothing .*instruct-pix2pix model"),
    (8, (), (), r"is an instruct-pix2pix model \(its UNet takes 8 channels\), and was given no image: give --image"),
    (
        8,
        ("image", "mask"),
        (),
        r"is an instruct-pix2pix model .* was given --image and --mask: give --image FILE alone",
    ),
    (9, (), (), r"is an inpainting model \(its UNet takes 9 channels\), and was given no image: .* --mask FILE"),
    (9, ("image",), (), r"is an inpainting model .* was given --image: give --image FILE and --mask FILE"),
]


@pytest.mark.parametrize(("channels", "names", "words", "message"), REFUSED)
def test_what_does_not_go_together_is_refused_before_loading(
    folders: dict[int, Path], files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    channels: int, names: tuple[str, ...], words: tuple[Any, ...], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "cut.png").write_bytes(files["image"].read_bytes()[:200])
    before = sorted(path.name for path in tmp_path.iterdir())
    result = run(folders[channels], "a cat", "-o", "out.png", *SETTINGS, *options(files, *names), *words)
    with pytest.raises(InputError, match=message):
        raise result.exception
    assert "load:" not in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_bundle_without_the_engines_for_images_says_what_is_missing(
    engine_bundle: Path, control_bundle: Path, bundle_copy: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    words = ("a cat", "-o", tmp_path / "out.png", *SETTINGS)
    with pytest.raises(InputError, match=r"has no ControlNet: .*sdkd export .* --controlnet FOLDER"):
        raise run(engine_bundle, *words, *options(files, "control")).exception
    with pytest.raises(InputError, match=r"runs eagerly without its ControlNet: leave out --target eager"):
        raise run(control_bundle, *words, *options(files, "control"), "--target", "eager").exception
    with pytest.raises(BundleError, match=r"has no openvino-bf16 engine for controlnet .*sdkd build-engine"):
        raise run(control_bundle, *words, *options(files, "control"), "--target", "openvino-bf16").exception
    whole = Bundle.open(bundle_copy)
    engines = {key: engine for key, engine in whole.manifest.engines.items() if "vae_encoder" not in key}
    Bundle(bundle_copy, replace(whole.manifest, engines=engines)).save()
    with pytest.raises(EngineError, match=r"no vae_encoder engine, which image-to-image and inpainting need"):
        raise run(bundle_copy, *words, *options(files, "image")).exception
