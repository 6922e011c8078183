"""What may be written where, said before any work; writing whole or not at all."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from sdkd.core.files import (
    check_file_free,
    check_free,
    lock,
    new_folder,
    read_json,
    sha256,
    staged_folder,
    write_bytes,
    write_json,
)
from sdkd.core.marks import KINDS, kind_of
from sdkd.core.outputs import check_filled, check_parts_free
from sdkd.core.replace import sweep, temporary_folder
from sdkd.errors import BusyError, InputError, OutputExistsError

BUNDLE = {"schema": 1, "source": {}, "versions": {}, "components": {}, "engines": {}}
RECORDS: dict[str, Any] = {
    "bundle.json": BUNDLE,
    "sdkd.json": {"teacher": "demo", "student": "sd-tiny", "random_weights": False, "steps": 0},
    "index.json": {"schema": 1, "images": 3, "data": "x", "resolution": 64, "scaling_factor": 1},
    "settings.json": {"schema": 1, "images": 3, "data": "x", "resolution": 64, "scaling_factor": 0.18},
    "evaluation.json": {"schema": 1, "settings": {}, "versions": {}, "models": []},
    "report.json": {"schema": 3, "setup": {}, "environment": {}, "results": []},
    "training.jsonl": {"step": 1, "loss/total": 1.5, "lr": 1e-4},
    "checkpoint.json": {"schema": 1, "step": 3, "settings": {}, "optimizer": {}},
}


def ours(folder: Path, name: str = "bundle.json") -> Path:
    """A folder with one record of sdkd's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(RECORDS[name]))
    return folder


@pytest.mark.parametrize("name", RECORDS)
def test_what_sdkd_wrote_is_known_by_its_record(name: str, tmp_path: Path) -> None:
    folder = ours(tmp_path / "out", name)
    assert kind_of(folder) is not None
    with pytest.raises(OutputExistsError, match="already exists: choose another folder or pass --overwrite"):
        check_free(folder, overwrite=False)
    check_free(folder, overwrite=True)
    for other in ("{}", "[]", '{"schema": "1"}', "{", "", '{"a":' * 100_000):
        (folder / name).write_text(other)
        assert kind_of(folder) is None, other[:20]
        with pytest.raises(OutputExistsError, match=rf"its {name} is damaged .*: choose another folder$"):
            check_free(folder, overwrite=True)


def test_files_of_others_beside_ours_keep_the_folder(tmp_path: Path) -> None:
    for index, foreign in enumerate(("thesis/chapter1.txt", "notes.md", "unet/notes.txt", ".git/HEAD", "link")):
        folder = ours(tmp_path / str(index))
        file = folder / foreign
        file.parent.mkdir(parents=True, exist_ok=True)
        if foreign == "link":
            file.symlink_to(tmp_path / "0" / "thesis")  # a link counts as a file of others
        else:
            file.write_text("years of work")
        with pytest.raises(OutputExistsError, match=f"holds '{foreign}' beside the bundle that sdkd wrote there"):
            new_folder(folder, overwrite=True).__enter__()
        assert file.exists()


def test_an_output_has_nothing_to_do_with_an_input(tmp_path: Path) -> None:
    model = ours(tmp_path / "models" / "own")
    ours(tmp_path / "models")
    (tmp_path / "link").symlink_to(model)
    for output, word in (
        (model, "is"),
        (tmp_path / "link", "is"),
        (model / "onnx", "lies in"),
        (model.parent, "holds"),
    ):
        for given in (model, str(model), tmp_path / "link", os.path.relpath(model)):
            with pytest.raises(InputError, match=f"output .* {word} the input .*: give a folder of its own"):
                check_free(output, True, [None, "", "segmind/tiny-sd", "x" * 5000, given])
    check_free(tmp_path / "models" / "other", True, [model])
    assert (model / "bundle.json").is_file()


def test_folders_that_nothing_can_take_the_place_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "above" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for place in (".", "", tmp_path / "home", "/", "/dev/shm", "/dev", tmp_path / "above"):
        with pytest.raises(InputError, match=r"output .* (is|holds) (the folder that you|your home|a mount)"):
            check_free(place, overwrite=True)
    ours(here / "demo")
    check_free("demo", True, ["demo"])  # the embedded model, no folder of that name


def test_places_where_no_output_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InputError, match="is a file, and a folder is to be written"):
        check_free(tmp_path / "file", overwrite=True)
    with pytest.raises(InputError, match=r"lies below .*file', which is a file"):
        check_free(tmp_path / "file" / "out", overwrite=True)
    for check in (check_free, check_file_free):
        with pytest.raises(InputError, match=r"is a link to '.*nowhere', which is not there: remove it"):
            check(tmp_path / "dangling", True)
        with pytest.raises(InputError, match=r"has too long a name: give one of at most \d+ bytes"):
            check(tmp_path / ("n" * 250), True)
        with pytest.raises(InputError, match="has too long a name"):
            check(tmp_path / "/".join(["deep"] * 1000), True)
    with pytest.raises(InputError, match="is a folder, and a file is to be written"):
        check_file_free(tmp_path / "folder", overwrite=True)
    with pytest.raises(InputError, match="is no regular file"):
        check_file_free(tmp_path / "fifo", overwrite=True)
    with pytest.raises(PermissionError, match="/proc") as found:
        check_free("/proc/sdkd/out", overwrite=False)
    assert found.value.filename == "/proc"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "dangling", "folder", "fifo"}


def test_an_output_file_is_replaced_only_when_asked_and_never_when_it_is_an_input(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    file = tmp_path / "lora" / "a.safetensors"
    file.write_text("x")
    os.link(file, tmp_path / "hard")
    with pytest.raises(OutputExistsError, match="already exists: choose another name or pass --overwrite"):
        check_file_free(file, overwrite=False, ours=Path.is_file)
    check_file_free(file, overwrite=True, ours=Path.is_file)
    with pytest.raises(OutputExistsError, match="already exists, and sdkd did not write it: choose another name"):
        check_file_free(file, overwrite=True)
    with pytest.raises(InputError, match="is the input"):
        check_file_free(file, True, [file])
    with pytest.raises(InputError, match="is the input"):
        check_file_free(tmp_path / "hard", True, [file])
    with pytest.raises(InputError, match="lies in the input"):
        check_file_free(file, True, [tmp_path / "lora"])
    check_file_free(tmp_path / "lora" / "new", False, [tmp_path / "lora"])


def test_a_folder_that_fills_may_hold_inputs_but_no_file_is_one(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("x")
    check_filled(tmp_path, [tmp_path / "00000.png"], [prompts])
    with pytest.raises(InputError, match=r"prompts\.txt' is the input"):
        check_filled(tmp_path, [prompts], [prompts])
    with pytest.raises(InputError, match="lies in the input"):
        check_filled(tmp_path / "images", [], [tmp_path])


def test_parts_are_replaced_only_with_the_record_of_their_kind(tmp_path: Path) -> None:
    kind = next(kind for kind in KINDS if kind.name == "comparison")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "holiday.jpg").write_text("x")
    parts = ("images", "report.json")
    with pytest.raises(OutputExistsError, match="already holds images, which sdkd did not write"):
        check_parts_free(tmp_path, kind, parts, True)
    ours(tmp_path, "report.json")
    with pytest.raises(OutputExistsError, match="already holds images, which sdkd did not write"):
        check_parts_free(tmp_path, kind, parts, True)
    (tmp_path / "images" / "holiday.jpg").rename(tmp_path / "holiday.jpg")
    check_parts_free(tmp_path, kind, parts, True)
    with pytest.raises(InputError, match=r"its report\.json is the input"):
        check_parts_free(tmp_path, kind, parts, True, [tmp_path / "report.json"])


@pytest.mark.parametrize("exchange", [True, False])
def test_the_old_folder_is_there_until_the_new_one_is_whole(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr("sdkd.core.replace._exchange", lambda *_: False)
    out = ours(tmp_path / "out")
    with staged_folder(out) as partial:
        (partial / "new").write_text("x")
        assert (out / "bundle.json").is_file()
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    ours(tmp_path / "large" / "out")
    (tmp_path / "out").symlink_to(tmp_path / "large" / "out")
    with new_folder(tmp_path / "out", overwrite=True) as partial:
        (partial / "new").write_text("x")
    assert (tmp_path / "out").is_symlink()
    assert [path.name for path in (tmp_path / "large" / "out").iterdir()] == ["new"]


def test_leftovers_of_killed_writers_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in (".out.12345678.partial", ".out.abcdefgh.old", ".out.x.12345678.partial", ".other.12345678.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.87654321.partial").write_text("a file's")
    with temporary_folder(out) as living:
        check_free(out, overwrite=False)
        assert {path.name for path in tmp_path.iterdir()} == {
            *(".out.x.12345678.partial", ".other.12345678.partial"),  # of other outputs
            living.name,
        }


def test_a_kill_between_two_renames_is_repaired(tmp_path: Path) -> None:
    aside = tmp_path / ".out.12345678.old"
    ours(aside / "old")
    (tmp_path / ".out.12345678.partial").mkdir()
    sweep(tmp_path / "out")
    assert (tmp_path / "out" / "bundle.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    shutil.copytree(tmp_path / "out", aside / "old")  # when the output is there, the other one is of no use
    sweep(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


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
