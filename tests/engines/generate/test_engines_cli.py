"""`sdkd generate`: on engines and eagerly, one clear message for bad input, settings inside the PNG."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from generate_runs import pixels, run
from PIL import Image

from engines.generate.cli import drawn_size, generate, output_files, prompt_texts
from engines.generate.drawing import Request, draw, encode_png
from engines.generate.prompts import METADATA, is_drawn
from export.build.options import BuildOptions
from sdkd.bundle.manifest import Bundle
from sdkd.core.console import quiet
from sdkd.core.profiles import Range
from sdkd.distill.data.opening import open_images
from sdkd.errors import EngineError, InputError, ModelError, OutputExistsError, RangeError
from sdkd.models.generation import FEW_STEPS, entry


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_bundle_and_eager_draw_the_same(engine_bundle: Path, folder: Path, tmp_path: Path, target: str) -> None:
    settings = ("--steps", 3, "--seed", 5, "--negative-prompt", "blue", "--scheduler", "euler")
    engine = run(engine_bundle, "a red star", "-o", tmp_path / "engine.png", "--target", target, *settings)
    eager = run(folder, "a red star", "-o", tmp_path / "eager.png", *settings)
    assert (engine.exit_code, eager.exit_code) == (0, 0), (engine.exception, eager.exception)
    assert np.abs(pixels(tmp_path / "engine.png") - pixels(tmp_path / "eager.png")).max() <= 1
    assert str(tmp_path / "engine.png") in engine.output.replace("\n", "")
    assert f"32x32 px (width x height), 3 steps, target {target}:" in engine.output
    assert "target eager:" in eager.output
    assert Image.open(tmp_path / "engine.png").text == {
        "prompt": "a red star",
        "negative_prompt": "blue",
        "seed": "5",
        "steps": "3",
        "guidance_scale": "7.5",
        "size": "32x32",
        "scheduler": "EulerDiscreteScheduler",
        "model": str(engine_bundle),
        "target": target,
    }


def test_a_few_step_model_is_drawn_as_it_was_made_for_unless_told_otherwise(bundle_copy: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    source = dict(bundle.manifest.source) | entry(FEW_STEPS)
    replace(bundle, manifest=replace(bundle.manifest, source=source)).save()
    result = run(bundle_copy, "x", "-o", tmp_path / "a.png", "--negative-prompt", "blue")
    said = " ".join(result.output.split())
    assert "4 steps, guidance 1, LCMScheduler: as the model was made for" in said
    assert "the negative prompt has no effect at guidance 1: give a guidance scale above 1" in said
    text = Image.open(tmp_path / "a.png").text
    assert [text[name] for name in ("steps", "guidance_scale", "scheduler")] == ["4", "1.0", "LCMScheduler"]
    other = run(
        bundle_copy, "x", "-o", tmp_path / "b.png", "--steps", 20, "--guidance-scale", 7.5, "--scheduler", "ddim"
    )
    said = " ".join(other.output.split())
    assert "20 steps, guidance 7.5, DDIMScheduler; the model was made for 4 steps, guidance 1, LCMScheduler" in said
    assert said.count(" on a model that ") == 3
    text = Image.open(tmp_path / "b.png").text
    assert [text[name] for name in ("steps", "guidance_scale", "scheduler")] == ["20", "7.5", "DDIMScheduler"]


def test_several_images_count_the_seed_up(engine_bundle: Path, tmp_path: Path) -> None:
    assert run(engine_bundle, "x", "-o", tmp_path / "a.png", "--steps", 1, "--seed", 3, "--count", 2).exit_code == 0
    assert run(engine_bundle, "x", "-o", tmp_path / "b.png", "--steps", 1, "--seed", 4).exit_code == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a-1.png", "a-2.png", "b.png"]
    assert Image.open(tmp_path / "b.png").text["target"] == "openvino"  # the best one
    assert Image.open(tmp_path / "a-2.png").text["seed"] == "4"
    assert np.array_equal(pixels(tmp_path / "a-2.png"), pixels(tmp_path / "b.png"))


def test_existing_images_are_kept_unless_overwritten(engine_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.png"
    assert run(engine_bundle, "x", "-o", output, "--steps", 1).exit_code == 0
    before = output.read_bytes()
    refused = run(engine_bundle, "x", "-o", output, "--steps", 1, "--seed", 1)
    assert isinstance(refused.exception, OutputExistsError)
    assert "pass --overwrite" in str(refused.exception)
    assert output.read_bytes() == before
    result = run(engine_bundle, "x", "-o", output, "--steps", 1, "--size", "64x32", "--overwrite")
    assert Image.open(output).size == (32, 64)
    assert "32x64 px (width x height)" in result.output


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (("--size", "50"), InputError, "height 50 is not a multiple of 4 pixels, as this model needs: use 48 or 52"),
        (("--size", "wide"), InputError, "size 'wide' is not understood: give pixels as 512"),
        (("--size", "128"), RangeError, "was asked for batch 1 (2 with guidance), height 128 px"),
        (("--scheduler", "magic"), InputError, "scheduler 'magic' is unknown: choose one of ddim"),
        (("--scheduler", "UNet2DModel"), InputError, "scheduler 'UNet2DModel' is unknown"),
        (("--target", "onnx"), InputError, "target 'onnx' is unknown: choose one of onnxruntime"),
    ],
)
def test_bad_input_is_named_and_nothing_written(
    engine_bundle: Path, tmp_path: Path, options: tuple[str, str], kind: type[Exception], message: str
) -> None:
    result = run(engine_bundle, "x", "-o", tmp_path / "a.png", "--steps", 1, *options)
    assert result.exit_code == 1
    assert isinstance(result.exception, kind)
    assert message in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_models_and_prompts_that_are_missing_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    nothing = (tmp_path / "nothing", "x")
    for words, error, message in (
        ((folder, "x", "--target", "openvino"), InputError, f"build-engine {folder} --target openvino --output arti"),
        *((nothing + more, ModelError, "nothing' does not exist") for more in ((), ("--target", "eager"))),
        ((*nothing, "--target", "openvino"), ModelError, "nothing' does not exist"),
        ((folder,), InputError, "give a prompt, or --prompts with a file"),
        ((folder, "x", "--prompts", tmp_path / "empty.txt"), InputError, "one of the two"),
        ((folder, "--prompts", tmp_path / "none.txt"), InputError, r"none\.txt' is no file"),
        ((folder, "--prompts", tmp_path / "empty.txt"), InputError, "holds no prompt"),
    ):
        with pytest.raises(error, match=message):
            raise run(*words).exception


def test_sizes_names_and_texts() -> None:
    assert prompt_texts("caf\udce9", None) == ("café",)
    assert drawn_size("512") == (512, 512)
    assert drawn_size("512x768") == (512, 768)
    assert output_files(None, "A small, RED star!", 1) == [Path("artifacts/a-small-red-star.png")]
    assert output_files(Path("x/y.png"), "", 2) == [Path("x/y-1.png"), Path("x/y-2.png")]
    assert output_files(None, "???", 1) == [Path("artifacts/image.png")]
    with pytest.raises(InputError, match=r"output 'a.jpg' is not a .png file"):
        output_files(Path("a.jpg"), "x", 1)
    data = encode_png(Image.new("RGB", (8, 8)), {"prompt": "ein rotes Herz für 猫"})
    assert Image.open(io.BytesIO(data)).text == {"prompt": "ein rotes Herz für 猫"}


def test_the_command_imports_nothing_heavy() -> None:
    heavy = ("torch", "diffusers", "onnx", "onnxruntime", "openvino", "tensorrt_rtx", "PIL")
    code = f"import sys, engines, engines.generate.cli; print([name for name in {heavy} if name in sys.modules])"
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


def test_a_file_of_prompts_becomes_a_folder_of_training_data(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes("a red star\r\n\r\na blue ring\r\n".encode("utf-16"))  # as Windows saves it
    out, settings = tmp_path / "out", ("--steps", 2, "--count", 2)
    first = run(folder, "--prompts", tmp_path / "list.txt", "-o", out, *settings)
    assert first.exit_code == 0, first.exception
    assert sorted(path.name for path in out.iterdir()) == [f"{index:05d}.png" for index in range(4)] + [METADATA]
    data = open_images(out)
    assert [data[index]["caption"] for index in range(4)] == ["a red star", "a blue ring"] * 2
    alone = run(folder, "a blue ring", "-o", tmp_path / "one.png", "--steps", 2, "--seed", 3)
    assert alone.exit_code == 0
    assert np.array_equal(pixels(out / "00003.png"), pixels(tmp_path / "one.png"))
    before = (out / "00001.png").stat().st_mtime_ns
    (out / "00002.png").unlink()
    again = run(folder, "--prompts", tmp_path / "list.txt", "-o", out, *settings)
    assert "for 1 image, 3 were there" in again.output.replace("\n", " ")
    assert (out / "00001.png").stat().st_mtime_ns == before
    other = run(folder, "--prompts", tmp_path / "list.txt", "-o", out, "--steps", 1, "--count", 2)
    with pytest.raises(OutputExistsError, match=r"00000\.png' is there and was drawn from other settings"):
        raise other.exception


def test_whatever_lies_in_a_folder_of_prompts_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "bomb.png")
    (tmp_path / "text.png").write_text("no image")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for name in ("bomb.png", "text.png"):
        with pytest.raises(OutputExistsError, match=rf"{name}' is there and was drawn from other settings"):
            is_drawn(tmp_path / name, {"prompt": "x"})


# Options out of bounds, and pixels that are no numbers


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"guidance_scale": math.nan}, "guidance scale nan is not finite"),
    ({"guidance_scale": math.inf}, "guidance scale inf is not finite"),
    ({"guidance_scale": 1e308}, r"guidance scale 1e\+308 is too large: give a number from 0 to 1000"),
    ({"seed": 2**64}, "seed 18446744073709551616 is too large"),
    ({"seed": -1}, "seed -1 is too small"),
    ({"count": 10**9}, "count 1000000000 is too large"),
    ({"steps": 10**9}, "steps 1000000000 is too large"),
    ({"steps": True}, "steps True is not a number"),
]


def test_the_command_refuses_before_it_looks_at_the_model_and_a_request_likewise() -> None:
    usual = {"height": 64, "width": 64, "steps": 2, "guidance_scale": 7.5, "seed": 0, "count": 1}
    for options, message in OPTIONS:
        with pytest.raises(InputError, match=message):
            generate("no-such-model", "a star", **options)
        with pytest.raises(InputError, match=message):
            Request(("a star",), None, **(usual | options))
    with pytest.raises(InputError, match="seed of the last image 18446744073709551616 is too large"):
        Request(("a star",), None, **(usual | {"seed": 2**64 - 1, "count": 2}))
    for name, value, message in (
        ("batch", 100_000, "batch 100000 is too large"),
        ("control_scale", math.nan, "is not finite"),
        ("image_guidance_scale", math.inf, "is not finite"),
    ):
        with pytest.raises(InputError, match=message):
            generate("no-such-model", "a star", **{name: value})
    for text in ("1000000000", "9" * 5000, "9000000"):
        with pytest.raises(InputError, match=r"is too large|is not understood"):
            drawn_size(text)
        with pytest.raises(InputError, match=r"is too large|is not understood|is not a whole"):
            Range.parse(f"1..{text}0")


def test_options_of_builds_are_numbers() -> None:
    with pytest.raises(InputError, match="workspace-gb nan is no size"):
        BuildOptions(workspace_gb=math.nan)
    with pytest.raises(InputError, match=r"built with options\.refit is 3, not text: build it again"):
        BuildOptions.of({"refit": 3})


def test_pixels_that_are_no_numbers_are_an_error(eager: StableDiffusionPipeline, tmp_path: Path) -> None:
    request = Request(("a star",), None, 32, 32, 2, 7.5, 0, 1)
    assert draw(eager, request, [0], quiet)[0].size == (32, 32)
    with torch.no_grad():
        next(eager.vae.decoder.parameters()).fill_(math.nan)
    with pytest.raises(EngineError, match=r"image 1: pixels are not finite .* nothing was written"):
        draw(eager, request, [0], quiet)
