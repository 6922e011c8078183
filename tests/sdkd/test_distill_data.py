"""Image folders, and what is wrong with some of them; pixels, latents and text embeddings."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest
import torch
from PIL import Image

from sdkd.distill.data import ImageFolder, open_images, to_pixels
from sdkd.distill.latents import TextEmbeddings, encode_images, training_size
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


def test_latents_are_the_scaled_posterior() -> None:
    pipe = helpers.tiny_pipeline()
    images = [{"image": Image.new("RGB", (64, 64), colour), "caption": colour} for colour in ("red", "blue", "lime")]
    cache = encode_images(pipe, images, size=64, batch_size=2)
    pixels = torch.stack([to_pixels(row["image"], 64) for row in images])
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
    torch.testing.assert_close(cache.mean, posterior.mean * 0.5)
    torch.testing.assert_close(cache.std, posterior.std * 0.5)
    assert cache.captions == ["red", "blue", "lime"]
    draws = [cache.sample(torch.tensor([2]), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert len(encode_images(pipe, images, size=64, limit=1)) == 1


def test_no_images() -> None:
    with pytest.raises(InputError, match="the data holds no images"):
        encode_images(helpers.tiny_pipeline(), [], size=64)


def test_size_must_fit_the_model() -> None:
    pipe = helpers.tiny_pipeline()
    assert training_size(pipe, None) == 64
    assert training_size(pipe, 128) == 128
    with pytest.raises(InputError, match="height 100 is not a multiple of 64 pixels"):
        training_size(pipe, 100)


def test_text_embeddings_are_the_pipelines(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = helpers.tiny_pipeline()
    captions = ["a star", "a ring", "a star"]
    expected = pipe.encode_prompt(["a ring", "", "a star"], "cpu", 1, False)[0]
    indices, empty = torch.tensor([1, 1, 2]), torch.tensor([False, True, False])
    kept = TextEmbeddings(pipe, captions)(indices, empty)
    monkeypatch.setattr("sdkd.distill.latents._TEXT_LIMIT", 0)  # too large to keep: encode in each step
    torch.testing.assert_close(kept, expected)
    torch.testing.assert_close(TextEmbeddings(pipe, captions)(indices, empty), expected)
