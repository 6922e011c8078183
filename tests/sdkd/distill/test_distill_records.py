"""What sdkd reads of its own beside a run and a shard: damaged in any way, it is one error that names the file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sdkd.distill.data.sources import TarShards, shard_members
from sdkd.distill.training.checkpoint import UNetRecord
from sdkd.distill.training.log import LOG, read_log
from sdkd.distill.training.plot import prompts, samples
from sdkd.distill.training.record import read_record
from sdkd.errors import InputError
from sdkd.models.diffusers_folder import PROVENANCE, provenance

CHECKPOINT: dict[str, Any] = {
    "schema": 1, "step": 2, "processes": 1, "settings": {}, "optimizer": {"param_groups": [], "state": {}},
    "schedule": {}, "scaler": None, "ema_steps": None, "skipped": {"total": 0, "row": 0}, "digests": {}, "files": {},
    "log": {"sums": {"loss/total": 1}, "counts": {"loss/total": 2}, "images": 2},
}  # fmt: skip
CHECKPOINT["sha256"] = hashlib.sha256(json.dumps(CHECKPOINT, sort_keys=True).encode()).hexdigest()
RECORD = {"step": 1, "lr": 0.1, "images_per_second": 2, "seconds": 1, "loss/total": 0.5}
Read = Callable[[Path], Any]
# file, what is in it, what reads its folder, and a key whose value is then a list
READERS: dict[str, tuple[str, dict[str, Any], Read, str]] = {
    "checkpoint": ("checkpoint.json", CHECKPOINT, partial(read_record, kind=UNetRecord), "step"),
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
        ({"log": {"sums": {"x": "1"}, "counts": {}, "images": 1}}, r"log\.sums\.x is '1', not a finite number"),
        ({"files": {"unet/x": 1}}, r"files\.'unet/x' is 1, not text"),
        ({"sha256": "0"}, "was changed in checkpoint.json"),
    ],
)
def test_a_checkpoint_of_odd_types(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "checkpoint.json").write_text(json.dumps(CHECKPOINT | change))
    with pytest.raises(InputError, match=message):
        read_record(tmp_path / "checkpoint-2", UNetRecord)


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
