"""Image folders, and what is wrong with some of them; pixels, latents and text embeddings."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest
import torch
from PIL import Image

from sdkd.distill.data.encode import encode_image
from sdkd.distill.data.image_folder import ImageFolder
from sdkd.distill.data.latents import TextEmbeddings, encode_images, training_size
from sdkd.distill.data.opening import FirstImages, fingerprint, open_images, to_pixels
from sdkd.distill.data.rows import caption_at
from sdkd.errors import InputError


def picture(path: Path, colour: str = "red", size: tuple[int, int] = (64, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_metadata(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "1.png", "blue")
    picture(tmp_path / "2.jpg")
    rows = [{"file_name": "a/1.png", "text": "blue"}, {"file_name": "2.jpg", "caption": "red"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    found = open_images(tmp_path)
    assert len(found) == 2
    assert [found[index]["caption"] for index in range(2)] == ["blue", "red"]
    assert found[0]["image"].getpixel((0, 0)) == (0, 0, 255)


def test_sidecars_are_paired_by_name(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"caption {name}\n")
    found = ImageFolder(tmp_path)
    assert [row[1] for row in found.rows] == ["caption a", "caption b", "caption c"]


def test_image_without_caption(tmp_path: Path) -> None:
    picture(tmp_path / "alone.png")
    with pytest.raises(InputError, match=r"alone.png' has no caption: put it into alone.txt beside it"):
        open_images(tmp_path)


def test_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no captioned images: add metadata"):
        open_images(tmp_path)
    with pytest.raises(InputError, match=r"nowhere' is no folder: give a folder of images .* or one of demo"):
        open_images(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 of .* is not understood"),
        ('{"file_name": "1.png"}', "line 1 of .* is not understood: give {"),
        ('{"file_name": "gone.png", "text": "x"}', "names 'gone.png', which is not there"),
    ],
)
def test_bad_metadata(line: str, message: str, tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(InputError, match=message):
        open_images(tmp_path)


@pytest.mark.parametrize("content", [b"no image", b""])
def test_unreadable_image(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    (tmp_path / "bad.txt").write_text("x")
    with pytest.raises(InputError, match=r"bad.png' cannot be read .* repair it, or remove it"):
        open_images(tmp_path)[0]


def test_truncated_image(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    (tmp_path / "cut.txt").write_text("x")
    with pytest.raises(InputError, match=r"cut.png' cannot be read"):
        open_images(tmp_path)[0]


def test_pixels_are_the_middle_of_the_image() -> None:
    wide = Image.new("RGB", (30, 10), "black")
    wide.paste("white", (10, 0, 20, 10))
    pixels = to_pixels(wide, 10)
    assert (tuple(pixels.shape), pixels.dtype) == ((3, 10, 10), torch.float32)
    assert torch.equal(pixels, torch.ones(3, 10, 10))
    assert to_pixels(Image.new("L", (100, 37), 0), 16).unique().tolist() == [-1.0]


def test_few_images_are_encoded_in_memory() -> None:
    pipe = helpers.tiny_pipeline()
    images = [{"image": Image.new("RGB", (64, 64), colour), "caption": colour} for colour in ("red", "blue", "lime")]
    found = encode_images(pipe.vae, images, size=64)
    for index, row in enumerate(images):
        mean, std = encode_image(pipe.vae, to_pixels(row["image"], 64))
        assert torch.equal(found.posterior(index)[0], mean)
        assert torch.equal(found.posterior(index)[1], std)
    assert found.captions == ["red", "blue", "lime"]
    assert len(encode_images(pipe.vae, images, size=64, limit=1)) == 1
    with pytest.raises(InputError, match="the data holds no images"):
        encode_images(pipe.vae, [], size=64)


def test_size_must_fit_the_model() -> None:
    pipe = helpers.tiny_pipeline()
    assert training_size(pipe, None) == 64
    assert training_size(pipe, 128) == 128
    with pytest.raises(InputError, match="height 100 is not a multiple of 64 pixels"):
        training_size(pipe, 100)


@pytest.mark.parametrize("limit", [1 << 30, 0])
def test_text_embeddings_are_the_pipelines(limit: int) -> None:
    pipe = helpers.tiny_pipeline()
    expected = pipe.encode_prompt(["a ring", "", "a star"], "cpu", 1, False)[0]
    embeddings = TextEmbeddings(pipe.tokenizer, pipe.text_encoder, limit)
    first = embeddings(["a ring", "", "a star"])
    torch.testing.assert_close(first, expected)
    assert torch.equal(embeddings(["a star", "a ring", "a star"]), first[[2, 0, 2]])


def test_columns_of_metadata(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    row = {"path": "1.png", "short": None, "long": ["a red square", "red"]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    found = open_images(tmp_path, image_column="path", caption_columns=("short", "long"))
    assert found[0]["caption"] == caption_at(found, 0) == "a red square"
    with pytest.raises(InputError, match=r"no column text or alt; its columns: path, short, long"):
        open_images(tmp_path, image_column="path", caption_columns=("text", "alt"))
    with pytest.raises(InputError, match=r"no column file_name; its columns: path, short, long"):
        open_images(tmp_path, caption_columns=("long",))


def test_a_huge_image_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "1.png")
    (tmp_path / "1.txt").write_text("x")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"1.png' cannot be read .*decompression bomb"):
        ImageFolder(tmp_path)[0]


def test_the_first_images_and_their_fingerprint(tmp_path: Path) -> None:
    for name in ("1", "2", "3"):
        picture(tmp_path / f"{name}.png", size=(64, 60 + int(name)))
        (tmp_path / f"{name}.txt").write_text(name)
    whole = open_images(tmp_path)
    first = FirstImages(whole, 2)
    assert ([row["caption"] for row in first], len(first), first.caption(1)) == (["1", "2"], 2, "2")
    assert len({fingerprint(whole), fingerprint(first), fingerprint(FirstImages(whole, 1))}) == 3
    assert fingerprint(FirstImages(whole, 9)) == fingerprint(whole)
