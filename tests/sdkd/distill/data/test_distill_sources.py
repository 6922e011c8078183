"""Tar shards, parquet and saved datasets: their rows, their order, and what is wrong with some of them."""

from __future__ import annotations

import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from sdkd.distill.data.opening import open_images
from sdkd.distill.data.sources import TarShards, matching, shard_members
from sdkd.errors import InputError

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def png(shade: int, size: tuple[int, int] = (8, 6), kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(stream, kind)
    return stream.getvalue()


def shard(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def shards(folder: Path, counts: tuple[int, ...] = (3, 2)) -> Path:
    number = iter(range(100))
    for place, count in enumerate(counts):
        files: dict[str, bytes] = {}
        for n in [next(number) for _ in range(count)]:
            files |= {f"{n:04d}.png": png(n), f"{n:04d}.txt": f"shade {n}\n".encode()}
        shard(folder / f"{place:02d}.tar", files)
    return folder


def red(image: Image.Image) -> int:
    return image.getpixel((0, 0))[0]


def test_shards_in_order(tmp_path: Path) -> None:
    found = open_images(shards(tmp_path))
    assert isinstance(found, TarShards)
    assert found.blocks == [range(3), range(3, 5)]
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(found.__getitem__, range(5)))
    assert [(red(row["image"]), row["caption"]) for row in rows] == [(n, f"shade {n}") for n in range(5)]
    assert found.caption(4) == "shade 4"
    assert found.image_size(2) == (8, 6)


def test_the_index_is_kept_and_checked(tmp_path: Path) -> None:
    path = shards(tmp_path) / "00.tar"
    first, note = shard_members(path), tmp_path / ".00.tar.index.json"
    kept = note.read_text()

    def changed(place: object) -> None:
        whole = json.loads(kept)
        whole["samples"]["0000"]["png"] = place
        note.write_text(json.dumps(whole))

    changed([0, 1])
    assert shard_members(path)["0000"]["png"].size == 1  # it was read, not the shard
    for place in ([-1, 5], [0, 1 << 60], [1 << 70, 1], [0], "ab", None):  # no place of the shard: made again
        changed(place)
        assert shard_members(path) == first
    changed([0, 1])
    os.utime(path, ns=(1, 1))
    assert shard_members(path) == first
    note.write_text("{")
    assert shard_members(path) == first


def test_names_are_keys_and_never_paths(tmp_path: Path) -> None:
    files = {"../../evil.png": png(1), "../../evil.txt": b"a", "a/x.seg.png": png(2), "/abs.jpg": png(3, kind="JPEG")}
    files |= {"/abs.json": b'{"caption": "b"}', "dir.d/y.PNG": png(4), "dir.d/y.txt": b"c", "._junk.png": b"no"}
    found = open_images(shard(tmp_path / "in" / "s.tar", files))
    assert [found[index]["caption"] for index in range(len(found))] == ["a", "b", "c"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".s.tar.index.json", "in", "s.tar"]


def test_captions_of_a_shard(tmp_path: Path) -> None:
    about = json.dumps({"blip": "from blip", "caption": ["first", "second"]}).encode()
    path = str(shard(tmp_path / "s.tar", {"1.jpg": png(1, kind="JPEG"), "1.txt": b"plain", "1.json": about}))
    captions = [
        open_images(path, caption_columns=names)[0]["caption"] for names in (("text",), ("blip",), ("caption",))
    ]
    assert captions == ["plain", "from blip", "first"]
    with pytest.raises(InputError, match="no caption column alt: its columns are blip, caption, text; name one with"):
        open_images(path, caption_columns=("alt",))
    with pytest.raises(InputError, match=r"hold no images \(webp; found: jpg, json, txt\)"):
        open_images(path, image_column="webp")


def test_truncated_shard(tmp_path: Path) -> None:
    path = shard(tmp_path / "cut.tar", {"1.png": png(1), "1.txt": b"one", "2.png": png(2), "2.txt": b"two"})
    whole = path.read_bytes()
    for left in (1400, 700, 100, 1024, 4 * 1024):  # the last: four headers with a block of data each, no end
        path.write_bytes(whole[:left])
        with pytest.raises(InputError, match=r"cut.tar' is truncated or no tar file .*: copy or make it again"):
            open_images(path)


def test_unreadable_rows_of_a_shard(tmp_path: Path) -> None:
    files = {f"{n}.png": png(n) for n in range(4)} | {"1.json": b'{"caption": null}', "2.json": b"{", "3.txt": b"three"}
    found = open_images(shard(tmp_path / "s.tar", files | {"4.png": b"nothing", "4.txt": b"four"}))
    assert found.caption(3) == "three"  # type: ignore[attr-defined]
    messages = (
        "'0' of .* has no caption in text, caption, prompt",
        "'1' of .* has no caption",
        "of '2' .* cannot be read",
    )
    for index, message in zip((0, 1, 2, 4), (*messages, r"image '4' of shard .*s.tar' cannot be read"), strict=True):
        with pytest.raises(InputError, match=message):
            found[index]


def test_patterns(tmp_path: Path) -> None:
    folder = shards(tmp_path, (1, 1, 1))
    assert [path.name for path in matching(f"{folder}/{{00..01}}.tar")] == ["00.tar", "01.tar"]
    assert [path.name for path in matching(f"{folder}/{{02,00}}.tar")] == ["02.tar", "00.tar"]
    assert [path.name for path in matching(f"{folder}/*.tar")] == ["00.tar", "01.tar", "02.tar"]
    assert len(open_images(f"{folder}/0[01].tar")) == 2
    with pytest.raises(InputError, match=r"03.tar' does not exist"):
        matching(f"{folder}/{{02..03}}.tar")
    with pytest.raises(InputError, match="matches no file: correct it"):
        matching(f"{folder}/*.parquet")


def rows(count: int = 3) -> dict[str, list[object]]:
    return {"image": [{"bytes": png(n), "path": None} for n in range(count)], "text": [f"t{n}" for n in range(count)]}


def test_parquet(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pa.table(rows()), folder / "a.parquet")
    for name in (folder / "a.parquet", folder, folder / "*.parquet"):
        found = open_images(name)
        assert [(red(found[n]["image"]), found[n]["caption"]) for n in range(len(found))] == [
            (n, f"t{n}") for n in range(3)
        ]
    assert (found.caption(2), found.image_size(2)) == ("t2", (8, 6))  # type: ignore[attr-defined]


def test_parquet_of_bytes_and_its_columns(tmp_path: Path) -> None:
    table = {"picture": [png(5), b"no"], "title": ["five", None]}
    pq.write_table(pa.table(table), tmp_path / "b.parquet")
    found = open_images(tmp_path / "b.parquet", image_column="picture", caption_columns=("alt", "title"))
    assert (red(found[0]["image"]), found[0]["caption"]) == (5, "five")
    with pytest.raises(InputError, match="image 1 of 'parquet' cannot be read"):
        found[1]
    with pytest.raises(InputError, match="image 1 of 'parquet' has no caption in title"):
        found.caption(1)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"no caption column text or .*: its columns are picture, title"):
        open_images(tmp_path / "b.parquet")
    with pytest.raises(
        InputError, match=r"no image column .*: its columns are picture, title; name one with --image-c"
    ):
        open_images(tmp_path / "b.parquet", caption_columns=("title",))


def test_saved_dataset(tmp_path: Path) -> None:
    images = [Image.new("RGB", (4, 5), (n, 0, 0)) for n in range(3)]
    features = datasets.Features({"photo": datasets.Image(), "caption": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"photo": images, "caption": ["a", "b", "c"]}, features=features)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "many")
    datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "other")
    for name in ("one", "many"):
        found = open_images(tmp_path / name)
        assert [(red(found[n]["image"]), found[n]["caption"]) for n in range(3)] == [(0, "a"), (1, "b"), (2, "c")]
        assert found.image_size(0) == (4, 5)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="has no split train, only test"):
        open_images(tmp_path / "other")


def test_data_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError,
        match=r"data 'nobody/nothing' could not be loaded .*; no folder of that name is here either: .*save_to_disk",
    ):
        open_images("nobody/nothing")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match=r"data 'photos/cats' is not there, though the folder 'photos' is"):
        open_images("photos/cats")


def test_text_of_a_shard_in_other_encodings(tmp_path: Path) -> None:
    about = "\ufeff" + json.dumps({"caption": "from json"})
    files = {"1.png": png(1), "1.TXT": b"\xef\xbb\xbfa\r\n", "2.png": png(2), "2.caption": "b é".encode("utf-16")}
    files |= {"3.gif": png(3, kind="GIF"), "3.json": about.encode(), "4.tif": png(4, kind="TIFF"), "4.txt": b"caf\xe9"}
    files |= {".ipynb_checkpoints/5.png": png(5), ".ipynb_checkpoints/5.txt": b"no", "__MACOSX/6.png": png(6)}
    found = open_images(shard(tmp_path / "s.tar", files))
    assert [found[index]["caption"] for index in range(len(found))] == ["a", "b é", "from json", "café"]
    (tmp_path / "._s.tar").write_bytes(b"of macOS")
    assert len(open_images(tmp_path)) == len(open_images(f"{tmp_path}/*.tar")) == 4


def test_paths_of_a_table_begin_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "set" / "data"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "1.png").write_bytes(png(1))
    (folder.parent / "2.png").write_bytes(png(2))
    whole = str(tmp_path / "3.png")
    Path(whole).write_bytes(png(3))
    names = ["images/1.png", "../2.png", whole, "gone.png"]
    pq.write_table(pa.table({"image": names, "text": names}), folder / "a.parquet")
    pictures = [{"bytes": None, "path": name} for name in names]
    pq.write_table(pa.table({"image": pictures, "text": names}), tmp_path / "set" / "b.parquet")
    found = open_images(folder / "a.parquet")
    assert [red(found[index]["image"]) for index in range(3)] == [1, 2, 3]
    with pytest.raises(InputError, match=r"image 3 of 'parquet' cannot be read .*No such file.*gone.png"):
        found[3]
    (folder / "a.parquet").unlink()
    (tmp_path / "set" / "2.png").rename(tmp_path / "2.png")  # so that ../2.png is beside the folder
    found = open_images(tmp_path / "set")
    assert [red(found[index]["image"]) for index in (1, 2)] == [2, 3]


def test_a_table_is_taken_before_the_images_that_it_names(tmp_path: Path) -> None:
    for index in range(3):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{index}.png").write_bytes(png(index))
    names = [f"images/{index}.png" for index in range(3)]
    pq.write_table(pa.table({"image": names, "text": names}), tmp_path / "train-0.parquet")
    pq.write_table(pa.table({"image": names[:1], "text": ["held out"]}), tmp_path / "test-0.parquet")
    found = open_images(tmp_path)
    assert [(red(row["image"]), row["caption"]) for row in map(found.__getitem__, range(3))] == list(enumerate(names))
    assert len(found) == 3
    for name in ("train-0", "test-0"):
        (tmp_path / f"{name}.parquet").unlink()
    pq.write_table(pa.table({"a": [1]}), tmp_path / "numbers.parquet")
    with pytest.raises(InputError, match=r"columns are a; .*numbers\.parquet', are read before its images: move them"):
        open_images(tmp_path)
    (tmp_path / "numbers.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"could not be loaded \(Parquet magic .*: restore or remove the parquet file"):
        open_images(tmp_path)
