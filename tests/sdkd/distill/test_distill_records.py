"""What sdkd reads of its own beside a run and a cache: damaged in any way, it is one error that names the file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdkd.distill.data.disk_cache import INDEX, DiskCache, open_cache
from sdkd.distill.data.sources import TarShards, shard_members
from sdkd.distill.training.checkpoint import read_record
from sdkd.distill.training.log import LOG, read_log
from sdkd.distill.training.plot import prompts, samples
from sdkd.errors import InputError
from sdkd.models.diffusers_folder import PROVENANCE, provenance

CHECKPOINT: dict[str, Any] = {
    "schema": 1, "step": 2, "processes": 1, "settings": {}, "optimizer": {"param_groups": [], "state": {}},
    "schedule": {}, "scaler": None, "ema_steps": None, "log": {"sums": {"loss/total": 1}, "images": 2},
}  # fmt: skip
RECORD = {"step": 1, "lr": 0.1, "images_per_second": 2, "seconds": 1, "loss/total": 0.5}
Read = Callable[[Path], Any]
# file, what is in it, what reads its folder, and a key whose value is then a list
READERS: dict[str, tuple[str, dict[str, Any], Read, str]] = {
    "checkpoint": ("checkpoint.json", CHECKPOINT, read_record, "step"),
    "provenance": (PROVENANCE, {"teacher": "demo", "student": "small"}, provenance, "teacher"),
    "prompts": ("samples/prompts.json", {"prompts": ["a"], "seed": 0}, prompts, "seed"),
    "log": (LOG, RECORD, lambda folder: read_log(folder / LOG), "lr"),
}
DAMAGE: dict[str, Callable[[str, str], bytes]] = {
    "empty": lambda whole, key: b"",
    "cut": lambda whole, key: whole[: len(whole) // 2].encode(),
    "deep": lambda whole, key: b"[" * 100_000,
    "no text": lambda whole, key: b"\xff" + whole.encode(),
    "a list": lambda whole, key: b"[]",
    "odd type": lambda whole, key: json.dumps(json.loads(whole) | {key: [[1]]}).encode(),
    "twice": lambda whole, key: f'{{"{key}": 1, {whole[1:]}'.encode(),
    "nan": lambda whole, key: f'{{"{key}": NaN}}'.encode(),
}


@pytest.mark.parametrize("reader", READERS)
def test_damaged_in_any_way_it_is_named(reader: str, tmp_path: Path) -> None:
    name, data, read, key = READERS[reader]
    file, whole = tmp_path / name, json.dumps(data)
    file.parent.mkdir(exist_ok=True)
    file.write_text(whole)
    assert read(tmp_path)
    after = f"\n{whole}\n".encode() if reader == "log" else b""  # only its last line may be cut
    for kind, damaged in DAMAGE.items():
        if (reader, kind) == ("prompts", "odd type"):
            continue  # its seed is not read
        file.write_bytes(damaged(whole, key) + after)
        with pytest.raises(InputError, match=rf"{re.escape(file.name)}.*(restore|delete)"):
            read(tmp_path)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(InputError, match=f"{file.name}' is no regular file"):
        read(tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(InputError, match=f"{file.name}' is no regular file"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "has schema 2, this sdkd reads 1: go on with the version that wrote it"),
        ({"schema": True}, "schema is True, not a whole number"),
        ({"optimizer": {"state": {}}}, r"optimizer\.param_groups is missing"),
        ({"log": {"sums": {"x": "1"}, "images": 1}}, r"log\.sums\.x is '1', not a finite number"),
        ({"files": {"unet/x": 1}}, r"files\.'unet/x' is 1, not text"),
        ({"sha256": "0"}, "was changed in checkpoint.json"),
    ],
)
def test_a_checkpoint_of_odd_types(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "checkpoint.json").write_text(json.dumps(CHECKPOINT | change))
    with pytest.raises(InputError, match=message):
        read_record(tmp_path / "checkpoint-2")


def test_the_last_line_of_a_log_may_be_cut_and_no_other(tmp_path: Path) -> None:
    line = json.dumps(RECORD)
    (tmp_path / LOG).write_text(f"{line}\n{line[:20]}")
    assert read_log(tmp_path / LOG) == [RECORD]
    (tmp_path / LOG).write_text(f"{line}\n{line[:20]}\n{line}\n")
    with pytest.raises(InputError, match=r"line 2 of .*training\.jsonl' is no record of a run \(is not JSON"):
        read_log(tmp_path / LOG)


def test_pictures_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    os.mkfifo(tmp_path / "samples" / "step-000001.png")
    with pytest.raises(InputError, match=r"step-000001\.png' is no regular file"):
        samples(tmp_path)


def cache(folder: Path, captions: list[str], **changes: Any) -> DiskCache:
    """A cache of three latents in two shards, with two rows of text, and something of its index changed."""
    (folder / "captions.jsonl").write_text("".join(f"{line}\n" for line in captions))
    tensors = {"mean": torch.zeros(2, 1, 1, 1), "std": torch.ones(2, 1, 1, 1), "text": torch.zeros(2, 1, 1)}
    records = []
    for name in ("latents-00000", "latents-00001", "text-00000"):
        file = folder / f"{name}.safetensors"
        save_file({key: value for key, value in tensors.items() if (key == "text") == name.startswith("text")}, file)
        data = file.read_bytes()
        records.append({"file": file.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    index = {
        "schema": 1, "images": 3, "resolution": 8, "precision": "fp32", "shard_images": 2, "latents": records[:2],
        "texts": records[2:],
        "captions": {"sha256": hashlib.sha256((folder / "captions.jsonl").read_bytes()).hexdigest()},
    }  # fmt: skip
    (folder / INDEX).write_text(json.dumps({**index, **{key: change(index[key]) for key, change in changes.items()}}))
    return open_cache(folder)


ROW = '{"text": "a"}'


@pytest.mark.parametrize(
    ("captions", "changes", "message"),
    [
        ([ROW] * 3, {"latents": lambda rows: rows[:1]}, r"index\.json of cache .*1 shards of latents for 3 rows, 2 in"),
        (
            [ROW] * 3,
            {"texts": lambda rows: rows * 2},
            r"index\.json of cache .*2 shards of texts for 2 rows, 2 in each",
        ),
        ([ROW] * 2, {}, r"captions\.jsonl of cache .*holds 2 captions of 3 images: make the cache again"),
        ([ROW, ROW, '{"text": 1}'], {}, r"captions\.jsonl of cache .*text is 1, not text"),
        ([ROW, ROW, "[" * 100_000], {}, r"captions\.jsonl of cache .*nested too deeply"),
        ([ROW, ROW, "5"], {}, r"captions\.jsonl of cache .*5, not an object"),
    ],
)
def test_a_cache_whose_index_does_not_fit_its_files(
    captions: list[str], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        cache(tmp_path, captions, **changes)


def test_a_shard_with_fewer_rows_than_its_index_says(tmp_path: Path) -> None:
    found = cache(tmp_path, [ROW] * 3)
    assert [float(found.posterior(index)[1]) for index in range(3)] == [1, 1, 1]
    found = cache(tmp_path, [ROW] * 3, shard_images=lambda size: 3, latents=lambda rows: rows[:1])
    with pytest.raises(InputError, match=r"latents-00000\.safetensors of cache .*has no row 2"):
        found.posterior(2)
    found = cache(tmp_path, [ROW] * 3, texts=lambda rows: [cache_record(tmp_path)])
    with pytest.raises(InputError, match=r"latents-00000\.safetensors of cache .*has no row 0"):
        found.text(-1)


def cache_record(folder: Path) -> Any:
    return json.loads((folder / INDEX).read_text())["latents"][0]


def test_shards_and_their_notes_are_read_as_regular_files_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.tar")
    with pytest.raises(InputError, match=r"shard '.*0\.tar' is no regular file"):
        TarShards([tmp_path / "0.tar"], None, ("text",))
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        for name in ("a.png", "a.json"):
            (tmp_path / name).write_text("[1]")
            tar.add(tmp_path / name, name)
    os.mkfifo(tmp_path / ".1.tar.index.json")
    assert list(shard_members(tmp_path / "1.tar")["a"]) == ["png", "json"]
