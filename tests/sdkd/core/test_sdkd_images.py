"""Images of every mode, turned, deep, transparent and damaged: one reader, right values."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdkd.core.images import image_size, read_mask, read_rgb, to_mask, to_rgb
from sdkd.errors import InputError

RAMP = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # the 8-bit levels in 16 bits
LEVELS = np.arange(256).reshape(16, 16)
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF>'
    "</x:xmpmeta>"
)


def stored(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def grey(image: Image.Image) -> list[list[int]]:
    values = np.asarray(image)
    if values.ndim == 3:
        assert (values == values[..., :1]).all()
        values = values[..., 0]
    return values.tolist()


def deep() -> dict[str, bytes]:
    """The same ramp from black to white in all kinds of deep files."""
    whole = RAMP.astype(np.int32)
    return {
        "16-bit PNG": stored(Image.fromarray(RAMP), "PNG"),
        "16-bit TIFF": stored(Image.fromarray(RAMP), "TIFF"),
        "16-bit TIFF, big end first": stored(Image.fromarray(RAMP.astype(">u2")), "TIFF"),
        "16-bit PGM": stored(Image.fromarray(whole), "PPM"),
        "16-bit JPEG 2000": stored(Image.fromarray(RAMP), "JPEG2000", irreversible=False),
        "32-bit TIFF of 16-bit values": stored(Image.fromarray(whole), "TIFF"),
        "32-bit TIFF": stored(Image.fromarray((LEVELS * ((2**31 - 1) / 255)).astype(np.int32)), "TIFF"),
        "32-bit TIFF of 8-bit values": stored(Image.fromarray(LEVELS.astype(np.int32)), "TIFF"),
        "floats to 1": stored(Image.fromarray((LEVELS / 255).astype(np.float32)), "TIFF"),
        "floats to 255": stored(Image.fromarray(LEVELS.astype(np.float32)), "TIFF"),
        "floats to 65535": stored(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    }


def test_deep_pixels_are_scaled_by_their_range() -> None:
    for name, data in deep().items():
        assert grey(read_rgb(data)) == LEVELS.tolist(), name
        assert grey(read_mask(data)) == LEVELS.tolist(), name


def test_a_dark_image_of_16_bits_stays_dark() -> None:
    for kind, values in (("PNG", RAMP // 257), ("PPM", (RAMP // 257).astype(np.int32))):
        assert np.asarray(read_rgb(stored(Image.fromarray(values), kind))).max() == 1
    data = stored(Image.fromarray(RAMP), "PNG", transparency=257)
    assert grey(read_rgb(data)) == np.where(LEVELS == 1, 255, LEVELS).tolist()


def test_numbers_of_no_known_range() -> None:
    for kind, numbers, message in (
        (np.float32, (0.0, float("nan")), "holds numbers that are not finite"),
        (np.float32, (0.0, 1e9), r"go from 0 to 1e\+09, a range that is not known: scale them to 0\.\.1"),
        (np.float32, (-0.1, 1.0), r"go from -0\.1 to 1"),
        (np.float32, (0.0, 1.02), r"go from 0 to 1\.02"),
        (np.int32, (0, 5_000_000), r"go from 0 to 5e\+06, .* scale them to 0\.\.255"),
        (np.int32, (-1, 10), r"go from -1 to 10"),
    ):
        data = stored(Image.fromarray(np.array([numbers], kind)), "TIFF")
        whole = rf"control 'd\.tif' cannot be read as an image \(.*{message}.*\): save it again"
        with pytest.raises(InputError, match=whole):
            read_rgb(data, "control 'd.tif'", "save it again")


def half_clear(mode: str) -> bytes:
    """Two pixels: red (grey 76) and a hidden blue."""
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 255, 0))
    if mode == "tRNS":
        return stored(image.convert("RGB"), "PNG", transparency=(0, 0, 255))
    if mode == "P":
        palette = image.convert("RGB").quantize(2)
        return stored(palette, "PNG", transparency=palette.getpixel((1, 0)))
    if mode == "GIF":
        return stored(image, "GIF")
    if mode == "WEBP":
        return stored(image, "WEBP", lossless=True, exact=True)
    return stored(image.convert(mode), "PNG")


def test_what_is_transparent_lies_on_white() -> None:
    for mode in ("RGBA", "LA", "P", "tRNS", "GIF", "WEBP"):
        found = read_rgb(half_clear(mode))
        assert found.mode == "RGB"
        assert found.getpixel((0, 0)) == ((76, 76, 76) if mode == "LA" else (255, 0, 0))
        assert found.getpixel((1, 0)) == (255, 255, 255)


def test_half_transparent_and_modes_of_memory() -> None:
    assert to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 51))).getpixel((0, 0)) == (204, 204, 204)
    assert to_rgb(Image.new("RGBa", (1, 1), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("La", (1, 1), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("PA", (1, 1))).mode == to_rgb(Image.new("HSV", (1, 1))).mode == "RGB"
    assert to_rgb(Image.new("1", (1, 1), 1)).getpixel((0, 0)) == (255, 255, 255)


def test_other_colours() -> None:
    for image, kind in [
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"),  # PIL writes Adobe's inverted kind
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"),
        (Image.new("RGB", (8, 8), "red").convert("YCbCr"), "JPEG"),
        (Image.new("LAB", (8, 8), (138, 209, 198)), "TIFF"),
        (Image.new("RGB", (8, 8), "red").quantize(4), "BMP"),
    ]:
        red, green, blue = read_rgb(stored(image, kind)).getpixel((4, 4))
        assert red > 245
        assert max(green, blue) < 10


def turned() -> dict[str, bytes]:
    """An image whose left half is red, to be turned by 90 degrees to the right: then red is on top."""
    image = Image.new("RGB", (32, 16), "blue")
    image.paste("red", (0, 0, 16, 16))
    exif, text = Image.Exif(), PngInfo()
    exif[0x0112] = 6
    text.add_itxt("XML:com.adobe.xmp", XMP)
    kinds = {"PNG": {}, "JPEG": {"quality": 100}, "WEBP": {"lossless": True}, "TIFF": {}}
    found = {kind: stored(image, kind, exif=exif, **options) for kind, options in kinds.items()}
    return found | {
        "PNG, XMP": stored(image, "PNG", pnginfo=text),
        "JPEG, XMP": stored(image, "JPEG", xmp=XMP.encode()),
    }


def test_images_are_turned_upright() -> None:
    for name, data in turned().items():
        upright = read_rgb(data)
        assert upright.size == image_size(data) == (16, 32), name
        assert upright.getpixel((8, 4))[0] > 200, name
        assert upright.getpixel((8, 28))[2] > 200, name
        assert read_mask(data).size == (16, 32), name


def test_the_first_of_several_frames() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "TIFF", "WEBP", "PNG"):
        data = stored(frames[0], kind, save_all=True, append_images=frames[1:])
        red, _, blue = read_rgb(data).getpixel((0, 0))
        assert (red > 240, blue < 10) == (True, True), kind


def strokes(ink: tuple[int, int, int], ground: tuple[int, int, int]) -> Image.Image:
    """A layer of a painting program: the left half opaque, one column half, the rest empty."""
    image = Image.new("RGBA", (4, 1), (*ground, 0))
    image.paste((*ink, 255), (0, 0, 2, 1))
    image.putpixel((2, 0), (*ink, 128))
    return image


def test_strokes_on_an_empty_layer_are_a_mask() -> None:
    black, white, red = (0, 0, 0), (255, 255, 255), (200, 0, 0)
    for ink, ground in ((white, white), (white, black), (black, black), (black, white), (red, black)):
        assert grey(read_mask(stored(strokes(ink, ground), "PNG"))) == [[255, 255, 128, 0]]


def test_masks_of_luminance() -> None:
    image = Image.new("RGBA", (3, 1), (255, 255, 255, 255))
    image.putpixel((1, 0), (0, 0, 0, 255))
    assert grey(to_mask(image)) == [[255, 0, 255]]  # all opaque: the colours are the mask
    image.putpixel((2, 0), (255, 255, 255, 0))
    assert grey(to_mask(image)) == [[255, 0, 0]]  # colours and holes: what is transparent is kept
    assert grey(to_mask(Image.new("1", (1, 1), 1))) == [[255]]
    assert grey(to_mask(Image.new("RGBA", (1, 1), (9, 9, 9, 0)))) == [[0]]
    assert grey(to_mask(Image.new("CMYK", (1, 1), (0, 0, 0, 0)))) == [[255]]


def test_damaged_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stored(Image.effect_noise((64, 64), 90), "PNG")
    for name, data in {"cut": whole[:2000], "empty": b"", "text": b"no image"}.items():
        (tmp_path / f"{name}.png").write_bytes(data)
        with pytest.raises(
            InputError, match=rf"image '.*{name}\.png' cannot be read as an image \(.*\): repair it, or remove it"
        ):
            read_rgb(tmp_path / f"{name}.png")
    with pytest.raises(InputError, match=r"shard x cannot be read as an image \(EPS is a drawing, not pixels\)"):
        read_rgb(stored(Image.new("RGB", (2, 2)), "EPS"), "shard x")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match=r"pipe\.png' cannot be read as an image \(it is a pipe"):
        read_rgb(tmp_path / "pipe.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for read in (read_rgb, read_mask, image_size):
        with pytest.raises(InputError, match=r"4096 pixels\) exceeds limit of 2000 pixels"):
            read(whole)
