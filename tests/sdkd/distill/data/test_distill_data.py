"""Folders of images as people have them, and what is wrong with some; pixels, latents and text embeddings."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import helpers
import pytest
import torch
from PIL import Image

from sdkd.core.images import read_rgb
from sdkd.distill.data.buckets import View, fit_pixels
from sdkd.distill.data.digests import fingerprint
from sdkd.distill.data.encode import STATES, TextParts, encode_image
from sdkd.distill.data.image_folder import METADATA, files_below
from sdkd.distill.data.latents import TextEmbeddings, encode_images, training_size
from sdkd.distill.data.opening import FirstImages, open_images
from sdkd.distill.data.rows import caption_at, caption_of, row_caption
from sdkd.distill.training.batches import ImageSamples
from sdkd.errors import InputError, TrainingError

NOTHING = View(torch.zeros(3, 8, 8), (8, 8, 0, 0, 8, 8))


def picture(path: Path, caption: str | None = None, suffix: str = ".txt", size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    if caption is not None:
        path.with_suffix(suffix).write_text(caption, encoding="utf-8")
    return path


def captions(folder: Path) -> list[str]:
    found = open_images(folder)
    return [found[index]["caption"] for index in range(len(found))]


@pytest.mark.parametrize(("separator", "mark"), [(",", "\ufeff"), (";", ""), ("\t", "\ufeff")])
def test_metadata_csv(separator: str, mark: str, tmp_path: Path) -> None:
    for name in ("1.png", "a/2.png", "3.png"):
        picture(tmp_path / name)
    rows = [("file_name", "text", '"other"'), ("1.png", '"one, ""two""\r\nthree; four"', "x"), ("a/2.png", "", "y")]
    lines = ["", *map(separator.join, rows), "", f'3.png{separator} "a, b"{separator}']
    (tmp_path / "metadata.csv").write_bytes((mark + "\r\n".join(lines) + "\r\n").encode())
    assert captions(tmp_path) == ['one, "two"\nthree; four', "", "a, b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,text\n1.png,a dog, red\n", r"line 2 of .* has more values than the header .*: put captions that"),
        ('file_name,text\n1.png,"a dog\n2.png,x\n', r"line 2 of .*metadata.csv' cannot be read \(unexpected end of d"),
        ("name,text\n1.png,x\n", r"no column file_name; its columns: name, text"),
        ("file_name,alt\n1.png,x\n", r"no column text or caption or prompt; its columns: file_name, alt"),
        ("file_name,text\n", "holds no captioned images: add metadata"),
        (f"file_name,text\n{'x' * 5000}.png,a\n", r"line 2 of .* names 'x*\.png', which is not there"),
        ("{", "line 1 of .* is not understood: give {"),
        ("[" * 100_000, "line 1 of .* is not understood: give {"),
        ('{"file_name": "1.png"}', "line 1 of .* is not understood: give {.*no column text or caption or prompt"),
        ('{"file_name": 5, "text": "x"}', "line 1 of .* is not understood: give {.*no column file_name"),
        ('{"file_name": "gone.png", "text": "x"}', "names 'gone.png', which is not there"),
    ],
)
def test_bad_lists(text: str, message: str, tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    (tmp_path / (METADATA if text.startswith(("{", "[")) else "metadata.csv")).write_text(text)
    with pytest.raises(InputError, match=message):
        open_images(tmp_path)


def test_columns_of_metadata(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    row = {"path": "1.png", "short": None, "long": ["a red square", "red"]}
    (tmp_path / METADATA).write_text(json.dumps(row) + "\n\n")
    found = open_images(tmp_path, image_column="path", caption_columns=("short", "long"))
    assert found[0]["caption"] == caption_at(found, 0) == "a red square"
    assert found[0]["image"].getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(InputError, match=r"give \{'path': .*no column text or alt; its columns: path, short, long"):
        open_images(tmp_path, image_column="path", caption_columns=("text", "alt"))


def test_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no captioned images: add metadata"):
        open_images(tmp_path)
    with pytest.raises(InputError, match=r"nowhere' is no folder: give a folder of images .*, or demo"):
        open_images(tmp_path / "nowhere")


def test_images_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    for name, content in {"bad": b"no image", "cut": whole[:2000], "empty": b"", "huge": whole}.items():
        (tmp_path / f"{name}.png").write_bytes(content)
        (tmp_path / f"{name}.txt").write_text(name)
    found = open_images(tmp_path)
    for index, (name, why) in enumerate({"bad": "", "cut": ".*truncated", "empty": ""}.items()):
        with pytest.raises(InputError, match=rf"{name}.png' cannot be read{why}.* repair it, or remove it"):
            found[index]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"huge.png' cannot be read.*decompression bomb"):
        found[3]


def test_metadata_lines_of_any_unicode(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = ["a\u2028b\u0085c", "süß \U0001f600", "half \ud83d"]
    for index in range(3):
        picture(tmp_path / "train" / f"{index}.png")
    lines = [json.dumps({"file_name": f"{n}.png", "text": text}, ensure_ascii=n == 2) for n, text in enumerate(texts)]
    (tmp_path / "train" / METADATA).write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    assert captions(tmp_path) == [*texts[:2], "half \ufffd"]
    (tmp_path / METADATA).write_text(json.dumps({"file_name": "train/1.png", "text": "one"}))
    assert captions(tmp_path) == ["one"]  # its own list comes first
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    assert captions(tmp_path) == ["one"]
    assert f"{tmp_path / METADATA} is used, {tmp_path / 'metadata.csv'} beside it is not" in caplog.text


def test_text_files_of_other_names(tmp_path: Path) -> None:
    for index, suffix in enumerate((".txt", ".TXT", ".caption", ".Caption")):
        picture(tmp_path / f"{index}.png", f"{index}{suffix}", suffix)
    picture(tmp_path / "4.png", "both", ".txt").with_suffix(".caption").write_text("not this")
    (tmp_path / "5.png").write_bytes((tmp_path / "4.png").read_bytes())
    (tmp_path / "5.txt").write_bytes(b"\xff\xfec\0a\0f\0\xe9\0\r\0\n\0")
    assert captions(tmp_path) == ["0.txt", "1.TXT", "2.caption", "3.Caption", "both", "café"]


def test_old_text_files_are_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for index in range(3):
        picture(tmp_path / f"{index}.png").with_suffix(".txt").write_bytes(b"caf\xe9")
    assert captions(tmp_path) == ["café"] * 3
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"file {str(tmp_path / '0.txt')!r} is not UTF-8 (byte 3): read as Windows-1252"
    )
    assert record.getMessage().endswith("(and 2 more)")


def test_all_kinds_of_images_and_what_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "b.JPG", "c.jfif", "d.gif", "e.tif", "f.TIFF", "g.webp", "h.bmp"):
        image = picture(tmp_path / f"{name[0]}.jpeg", name)
        Image.open(image).save(tmp_path / name, None if name != "c.jfif" else "JPEG")
        image.unlink()
    for name in ("._a.png", ".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/x/a.png", ".hidden/b.png"):
        picture(tmp_path / name)
    (tmp_path / "photo.heic").write_bytes(b"?")
    (tmp_path / "photo.txt").write_text("of a kind that is not read")
    assert captions(tmp_path) == ["a.png", "b.JPG", "c.jfif", "d.gif", "e.tif", "f.TIFF", "g.webp", "h.bmp"]
    assert f"1 text files have no image beside them of a kind that is read, such as {tmp_path}/photo.txt" in caplog.text


def test_links_to_folders_and_their_loops(tmp_path: Path) -> None:
    picture(tmp_path / "far" / "deep" / "1.png", "one")
    picture(tmp_path / "data" / "2.png", "two")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data")
    (tmp_path / "far" / "deep" / "up").symlink_to(tmp_path / "far")
    (tmp_path / "data" / "dangling").symlink_to(tmp_path / "gone")
    assert captions(tmp_path / "data") == ["two", "one"]
    assert len(files_below(tmp_path / "data")) == 5


def listed(folder: Path, count: int, bad: dict[int, object]) -> Path:
    """`count` lines, of which some have another caption, or none where it is ...; one image for all."""
    picture(folder / "1.png")
    rows = [{"file_name": "1.png", "text": bad.get(index, str(index))} for index in range(count)]
    lines = [{"file_name": row["file_name"]} if row["text"] is ... else row for row in rows]
    (folder / METADATA).write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.mark.parametrize("nothing", [None, ..., float("nan"), [], {"a": 1}])
def test_one_of_a_hundred_may_have_no_caption(nothing: object, tmp_path: Path) -> None:
    images = open_images(listed(tmp_path, 100, {7: nothing}))
    assert len(images) == 100
    for read in (images.__getitem__, images.caption, images.image_size):  # type: ignore[attr-defined]
        with pytest.raises(InputError, match=r"line 8 of .*metadata.jsonl' (has no caption in text|.*no column text)"):
            read(7)
    with pytest.raises(InputError, match=r"line 8 of .* \(2 of 100 are like that, 1% may be\)"):
        open_images(listed(tmp_path, 100, {7: nothing, 9: nothing}))


def test_images_that_are_not_there_count_alike(tmp_path: Path) -> None:
    for index in range(100):
        picture(tmp_path / f"{index:03d}.png", None if index == 3 else str(index))
    images = open_images(tmp_path)
    with pytest.raises(InputError, match=r"003.png' has no caption: put it into 003.txt"):
        images[3]
    (tmp_path / "004.txt").unlink()
    with pytest.raises(InputError, match=r"003.png' has no caption: .* \(2 of 100 are like that"):
        open_images(tmp_path)


def test_a_caption_that_is_missing_is_replaced_like_an_image(tmp_path: Path) -> None:
    images = open_images(listed(tmp_path, 200, {7: None, 8: None}))
    samples = ImageSamples(images, None, lambda *_: NOTHING, workers=0)  # type: ignore[arg-type]
    assert [samples.caption(index) for index in (6, 7, 8, 9)] == ["6", "9", "9", "9"]
    assert sorted(samples.unreadable) == [7, 8]
    few = ImageSamples([{"image": None, "caption": None}], None, lambda *_: NOTHING, workers=0)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match=r"1 of 1 images .*image 0 has no caption: add it"):
        few.caption(0)


def test_what_is_a_caption() -> None:
    assert caption_of({"text": "\ufeffa"}, ("text",)) == "a"
    assert caption_of({"text": None, "caption": ["first", "second"]}, ("text", "caption")) == "first"
    assert caption_of({"text": 7}, ("text",)) == row_caption({"caption": 7}, 0) == "7"
    assert row_caption({"caption": ""}, 0) == ""
    assert caption_of({"text": float("nan")}, ("text",)) is None


def test_slim_images_cost_what_is_kept() -> None:
    wide = Image.new("RGB", (4000, 80), "black")
    wide.paste("white", (1990, 0, 2010, 80))
    tracemalloc.start()
    pixels = fit_pixels(wide, 512, 512)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6  # of numpy; PIL's 39 MB of a whole resized image would come on top of it
    assert pixels[:, :, 200:].mean() < pixels[:, :, 256 - 60 : 256 + 60].mean()
    reference = wide.resize((25600, 512), Image.Resampling.LANCZOS).crop((12544, 0, 13056, 512))
    expected = torch.frombuffer(bytearray(reference.tobytes()), dtype=torch.uint8).view(512, 512, 3)
    assert torch.equal(pixels, expected.float().permute(2, 0, 1) / 127.5 - 1)
    with pytest.raises(
        InputError, match=r"an image of 3000x1 px is more than 64 times as long as it is wide: .* crop it"
    ):
        fit_pixels(Image.new("RGB", (3000, 1)), 512, 512)


def test_an_image_too_slim_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (3000, 1)).save(tmp_path / "slim.png")
    with pytest.raises(InputError, match=r"^image '.*slim\.png' of 3000x1 px is more than 64 times"):
        fit_pixels(read_rgb(tmp_path / "slim.png"), 512, 512)


def test_deep_pixels_reach_the_trainer() -> None:
    ramp = Image.new("I;16", (2, 1), 65535)
    ramp.putpixel((0, 0), 0)
    assert fit_pixels(ramp, 1, 2).tolist() == [[[-1.0, 1.0]]] * 3


def test_few_images_are_encoded_in_memory() -> None:
    pipe = helpers.tiny_pipeline()
    images = [{"image": Image.new("RGB", (64, 64), colour), "caption": colour} for colour in ("red", "blue", "lime")]
    found = encode_images(pipe.vae, images, size=64)
    for index, row in enumerate(images):
        mean, std = encode_image(pipe.vae, fit_pixels(row["image"], 64, 64))
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
    embeddings = TextEmbeddings(TextParts.of(pipe), limit)
    first = embeddings(["a ring", "", "a star"])
    assert [*first] == [STATES]
    torch.testing.assert_close(first[STATES], expected)
    assert torch.equal(embeddings(["a star", "a ring", "a star"])[STATES], first[STATES][[2, 0, 2]])


def test_the_first_images_and_their_fingerprint(tmp_path: Path) -> None:
    for name in ("1", "2", "3"):
        picture(tmp_path / f"{name}.png", name, size=(64, 60 + int(name)))
    whole = open_images(tmp_path)
    first = FirstImages(whole, 2)
    assert ([row["caption"] for row in first], len(first), first.caption(1)) == (["1", "2"], 2, "2")
    assert len({fingerprint(whole), fingerprint(first), fingerprint(FirstImages(whole, 1))}) == 3
    assert fingerprint(FirstImages(whole, 9)) == fingerprint(whole)
