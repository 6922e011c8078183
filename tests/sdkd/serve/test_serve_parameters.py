"""Settings in image files: A1111's text, written and read, and where each format keeps it."""

from __future__ import annotations

import io

import pytest
from PIL import Image

import sdkd
from sdkd.errors import InputError
from sdkd.serve.caption import Caption
from sdkd.serve.encoding import encode, text_in
from sdkd.serve.jobs import Drawn, Timing
from sdkd.serve.parameters import parse, read, sampler_name, write
from sdkd.serve.wanted import Limits

SETTINGS = {
    "prompt": "a cat,\nsitting: here",
    "negative_prompt": "ugly\nblurred",
    "seed": "7",
    "steps": "25",
    "guidance_scale": "7.5",
    "size": "48x64",
    "scheduler": "EulerAncestralDiscreteScheduler",
    "model": "cats, and: dogs",
    "target": "openvino",
    "strength": "0.5",
    "loras": "fur:0.8, tail:-1",
}
TEXT = (
    "a cat,\nsitting: here <lora:fur:0.8> <lora:tail:-1>\n"
    "Negative prompt: ugly\nblurred\n"
    'Steps: 25, Sampler: Euler a, CFG scale: 7.5, Seed: 7, Size: 64x48, Model: "cats, and: dogs", '
    f"Denoising strength: 0.5, Target: openvino, Version: sdkd {sdkd.__version__}"
)


def drawn(settings: dict[str, str] = SETTINGS) -> Drawn:
    pixels = bytes(value % 256 for value in range(64 * 48 * 3))
    return Drawn(0, 7, 64, 48, pixels, Caption(settings), Timing(0, 0, 0, 0, 0, 1))


def test_settings_are_written_as_a1111_does_and_read_back():
    assert write(SETTINGS) == TEXT
    assert read(TEXT) == SETTINGS
    assert write({"prompt": "a"}) == f"a\nVersion: sdkd {sdkd.__version__}"


def test_a_text_of_a1111_is_read():
    text = (
        "masterpiece, (a house:1.2) <lora:roof:0.6>\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, "
        'Model hash: 6ce0161689, Model: v1-5-pruned, Lora hashes: "roof: 0a1b, wall: 2c3d", Version: v1.10.1'
    )
    assert read(text) == {
        "prompt": "masterpiece, (a house:1.2)",
        "steps": "20",
        "scheduler": "DPMSolverMultistepScheduler",
        "guidance_scale": "7",
        "seed": "965400086",
        "size": "768x512",
        "model": "v1-5-pruned",
        "loras": "roof:0.6",
    }
    found = parse(text)
    assert (found["Size-1"], found["Size-2"], found["Lora hashes"]) == ("512", "768", "roof: 0a1b, wall: 2c3d")
    assert found["Negative prompt"] == ""


@pytest.mark.parametrize("text", ["", "a cat", "one: 1, two: 2", "a cat\nin a house: red", "a" * 100_000])
def test_a_text_without_fields_is_a_prompt(text: str):
    assert read(text) == {"prompt": text}


def test_schedulers_without_a_name_of_a1111_keep_their_class():
    assert sampler_name("PNDMScheduler") == "PLMS"
    assert sampler_name("DPMSolverSinglestepScheduler") == "DPMSolverSinglestepScheduler"


def test_a_png_has_all_pixels_each_setting_and_a1111s_text():
    data = encode(drawn())
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.size, image.tobytes()) == ("PNG", (64, 48), drawn().pixels)
    assert image.text == SETTINGS | {"parameters": TEXT}
    assert text_in(data, "image", Limits()) == SETTINGS | {"parameters": TEXT}


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_jpeg_and_webp_have_the_text_as_a_comment(kind: str):
    good, poor = (encode(drawn(), kind, quality) for quality in (90, 0))
    image = Image.open(io.BytesIO(good))
    assert (image.format, image.size) == (kind.upper(), (64, 48))
    assert image.getexif().get_ifd(0x8769)[0x9286] == b"UNICODE\0" + TEXT.encode("utf-16-be")
    assert text_in(good, "image", Limits())["parameters"] == TEXT
    assert len(poor) < len(good)


def test_a_prompt_that_a_jpeg_has_no_room_for_is_left_out():
    data = encode(drawn({"prompt": "a" * 40_000}), "jpeg")
    assert "parameters" not in text_in(data, "image", Limits())
    assert Image.open(io.BytesIO(data)).size == (64, 48)


def test_other_formats_are_refused():
    with pytest.raises(InputError, match=r"format 'gif' is unknown: choose one of png, jpeg, webp"):
        encode(drawn(), "gif")
