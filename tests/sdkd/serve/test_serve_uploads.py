"""Images that come with a request: base64, files, limits, and the masks of other programs."""

from __future__ import annotations

import asyncio
import base64
import io

import numpy as np
import pytest
from PIL import Image
from starlette.datastructures import UploadFile

from sdkd.errors import InputError
from sdkd.serve.api.webui_inpainting import inpainting
from sdkd.serve.caption import Caption
from sdkd.serve.errors import TooLargeError, status_of
from sdkd.serve.jobs import Drawn, Timing
from sdkd.serve.uploads import from_base64, from_upload, mask_of_transparency, read_images
from sdkd.serve.wanted import Limits

LIMITS = Limits(pixels=64 * 64, body_bytes=1000)


def png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", **options)
    return buffer.getvalue()


def halves(left: object, right: object, mode: str = "RGB") -> Image.Image:
    image = Image.new(mode, (32, 16), right)
    image.paste(left, (0, 0, 16, 16))
    return image


def test_base64_is_read_plain_as_a_data_uri_and_with_line_breaks():
    text = base64.b64encode(b"some bytes").decode()
    for form in (
        text,
        f" {text}\n",
        f"{text[:4]}\r\n{text[4:]}",
        f"data:image/png;base64,{text}",
        f"DATA:;base64,{text}",
    ):
        assert from_base64(form, "image", LIMITS) == b"some bytes"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"mask is empty: send a PNG, JPEG or WebP file, or leave it out"),
        ("data:image/png;base64,", r"mask is empty"),
        ("abc", r"mask is not base64 \(.*\): send a PNG, JPEG or WebP file in base64"),
        ("a*cd", r"mask is not base64"),
        ("éabc", r"mask is not base64"),
        ("data:image/png,abcd", r"mask is a data URI without base64 \('data:image/png'\)"),
        ("data:text/html;base64,YWJj", r"mask is a data URI of something else \('data:text/html;base64'\)"),
        ("http://localhost/a.png", r"mask is an address \('http://localhost/a.png'\), and nothing is fetched from one"),
    ],
)
def test_what_is_no_base64_of_an_image_is_refused(text: str, message: str):
    with pytest.raises(InputError, match=message):
        from_base64(text, "mask", LIMITS)


def test_files_beyond_the_limit_are_refused():
    exact = base64.b64encode(bytes(1000)).decode()
    assert len(from_base64(exact, "image", LIMITS)) == 1000
    message = r"image is larger than the 1000 bytes that this server takes: send a smaller image"
    with pytest.raises(TooLargeError, match=message) as refused:
        from_base64(base64.b64encode(bytes(1001)).decode(), "image", LIMITS)
    assert status_of(refused.value) == 413

    def upload(data: bytes) -> bytes:
        return asyncio.run(from_upload(UploadFile(io.BytesIO(data)), "image", LIMITS))

    assert upload(b"some") == b"some"
    with pytest.raises(TooLargeError, match=message):
        upload(bytes(1001))
    with pytest.raises(InputError, match=r"image is empty"):
        upload(b"")


def test_images_and_masks_are_read_upright_in_their_modes():
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    found = read_images(png(halves("red", "blue"), exif=exif), png(halves(255, 0, "L")), LIMITS)
    assert {name: (one.mode, one.size) for name, one in found.items()} == {
        "image": ("RGB", (16, 32)),
        "mask": ("L", (32, 16)),
    }
    assert found["image"].getpixel((0, 0)) == (255, 0, 0)
    assert read_images(None, None, LIMITS) == {}


def test_a_header_beyond_the_limit_is_refused_before_its_pixels_are_read():
    small, large = png(Image.new("RGB", (8, 8))), png(Image.new("L", (65, 64)))
    with pytest.raises(TooLargeError, match=r"mask of 65x64 pixels is larger than this server takes \(4096 pixels\)"):
        read_images(small, large[:60], LIMITS)
    with pytest.raises(InputError, match=r"image cannot be read as an image .*: send a PNG, JPEG or WebP file"):
        read_images(b"no image", None, LIMITS)
    with pytest.raises(InputError, match=r"mask has no image to act on: send image, too"):
        read_images(None, small, LIMITS)


def test_what_openais_mask_has_transparent_is_white():
    mask = mask_of_transparency(png(halves((9, 9, 9, 0), (0, 0, 0, 255), "RGBA")), "mask", LIMITS)
    assert read_images(mask, mask, LIMITS)["mask"].tobytes() == halves(255, 0, "L").tobytes()
    with pytest.raises(InputError, match=r"mask is opaque everywhere: make it transparent where"):
        mask_of_transparency(png(halves("red", "blue")), "mask", LIMITS)


def drawn(size: tuple[int, int]) -> Drawn:
    pixels = Image.new("RGB", size, "lime").tobytes()
    return Drawn(0, 1, *size, pixels, Caption({}), Timing(0, 0, 0, 0, 0, 1))


def test_a_masked_area_is_drawn_alone_and_put_back():
    mask = Image.new("L", (60, 40))
    mask.paste(255, (10, 10, 20, 14))
    image = png(Image.new("RGB", (60, 40), "navy"))
    inside = inpainting(image, png(mask), LIMITS, size=(32, 32), only_masked=True, padding=1)
    assert inside.box == (9, 6, 21, 18)  # square, as what is drawn, and all of the mask with its padding
    given, white = (Image.open(io.BytesIO(data)) for data in inside.inputs())
    assert given.size == white.size == (12, 12)
    done = inside.onto(drawn((32, 32)))
    found = np.frombuffer(done.pixels, np.uint8).reshape(40, 60, 3)
    expected = np.zeros((40, 60, 3), np.uint8) + np.array([0, 0, 128], np.uint8)
    expected[10:14, 10:20] = (0, 255, 0)
    assert (done.width, done.height) == (60, 40)
    assert np.array_equal(found, expected)


def test_a_box_stays_inside_the_image_and_a_black_mask_means_all_of_it():
    mask = Image.new("L", (60, 40))
    image = png(Image.new("RGB", (60, 40), "navy"))
    assert inpainting(image, png(mask), LIMITS, size=(32, 32), only_masked=True).box == (0, 0, 60, 40)
    mask.paste(255, (50, 0, 60, 40))
    assert inpainting(image, png(mask), LIMITS, size=(32, 32), only_masked=True, padding=90).box == (0, 0, 60, 40)
    assert inpainting(image, png(mask), LIMITS, size=(64, 32), only_masked=True).box == (0, 0, 60, 40)
    assert inpainting(image, png(mask), LIMITS, size=(32, 32), only_masked=True).box == (20, 0, 60, 40)


def test_masks_are_inverted_and_blurred_and_their_area_is_filled():
    image, mask = png(halves("red", "blue")), png(halves(255, 0, "L"))
    plain = inpainting(image, mask, LIMITS, size=(32, 16), inverted=True)
    assert plain.mask.tobytes() == halves(0, 255, "L").tobytes()
    soft = inpainting(image, mask, LIMITS, size=(32, 16), blur=(2, 0))
    row = [soft.mask.getpixel((x, 8)) for x in (0, 15, 16, 31)]
    assert row[0] == 255 > row[1] > row[2] > row[3] == 0
    filled = Image.open(io.BytesIO(inpainting(image, mask, LIMITS, size=(32, 16), fills=True).inputs()[0]))
    assert {filled.getpixel((x, 8)) for x in (0, 8, 15, 20)} == {(0, 0, 255)}
    white = png(Image.new("L", (32, 16), 255))  # nothing is around it
    kept = Image.open(io.BytesIO(inpainting(image, white, LIMITS, size=(32, 16), fills=True).inputs()[0]))
    assert kept.tobytes() == halves("red", "blue").tobytes()
