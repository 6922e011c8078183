from __future__ import annotations

import hashlib
import multiprocessing
import os
from pathlib import Path

import pytest

from sdkd.core.files import lock, new_folder, read_json, sha256, write_bytes, write_json
from sdkd.errors import BusyError


def test_sha256_is_the_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"engine" * 1000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"engine" * 1000).hexdigest()


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bundle.json"
    write_json(path, {"a": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(path, b"half")
    assert read_json(path) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle.json"]


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "a.json", {"psnr_db": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_a_folder_appears_only_when_done(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with new_folder(target) as partial:
        (partial / "x").write_text("1")
        assert not target.exists()
    assert (target / "x").read_text() == "1"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def work() -> None:
        with new_folder(tmp_path / "out") as partial:
            (partial / "x").write_text("half")
            raise KeyboardInterrupt("stop")

    with pytest.raises(KeyboardInterrupt, match="stop"):
        work()
    assert list(tmp_path.iterdir()) == []


def _hold(path: Path, held: object, done: object) -> None:
    with lock(path):
        held.set()  # type: ignore[attr-defined]
        done.wait(30)  # type: ignore[attr-defined]


def test_a_lock_holds_across_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "out", held, done))
    holder.start()
    try:
        assert held.wait(60)
        with pytest.raises(BusyError, match="is being written by another process"), lock(tmp_path / "out"):
            pass
    finally:
        done.set()
        holder.join(30)
    with lock(tmp_path / "out"):
        pass
