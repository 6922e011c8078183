"""`sdkd cache` as a job: options, processes, Ctrl-C, and what it counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from processes import interrupted
from training_runs import sdkd, teacher

from sdkd.core.child import ChildError
from sdkd.distill.cache_cli import CacheJob, _failed, run
from sdkd.distill.data.disk_cache import DiskCache
from sdkd.errors import InterruptedRunError, OutputExistsError, SdkdError


def job(out: Path, **changes: Any) -> CacheJob:
    usual = {"data": "demo", "max_images": 12, "shard_images": 3, "precision": "fp32"}
    return CacheJob(str(teacher()), output=str(out), **(usual | changes))


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--max-images", 12, "--shard-images", 3, "--precision", "fp32", "--json"]
    sdkd("cache", teacher(), "demo", tmp_path / "one", *words)
    summary = json.loads(capsys.readouterr().out)
    assert (summary["images"], summary["resolution"], summary["unreadable"]) == (12, 64, {})
    run(job(tmp_path / "two"), 2)
    one, two = DiskCache(tmp_path / "one"), DiskCache(tmp_path / "two")
    assert one.index == two.index
    assert torch.equal(one.posterior(11)[0], two.posterior(11)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp16", "device": "cpu"}, "precision 'fp16' needs a CUDA device"),
        ({"precision": "int8"}, "precision 'int8' is unknown: choose one of fp32, fp16, bf16"),
        ({"resolution": 100}, "height 100 is not a multiple of 64"),
        ({"max_images": 0}, "max_images 0 is not positive"),
        ({"device": "tpu"}, "device 'tpu' is unknown: give auto, cpu or cuda"),
        ({"data": "nowhere.tar"}, "data file 'nowhere.tar' does not exist"),
        ({"caption_columns": ()}, "no caption columns were given"),
    ],
)
def test_wrong_options(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    wrong = CacheJob(**{**vars(job(tmp_path / "c")), **changes})
    with pytest.raises(SdkdError, match=message):
        run(wrong)
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_ctrl_c_ends_all_processes(tmp_path: Path) -> None:
    out, log = tmp_path / "work" / "c", tmp_path / "log"
    words = ["cache", teacher(), "demo", out, "--shard-images", 8, "--precision", "fp32", "--num-processes", 2]
    status = interrupted(words, log, lambda: len(list(out.glob("latents-*.json"))) >= 2)
    printed = log.read_text()
    assert status == 130, printed
    assert "Traceback" not in printed
    assert "complete shards are kept in" in printed
    names = {path.name for path in out.iterdir()}
    assert "index.json" not in names
    assert not [name for name in names if name.endswith(".partial")]
    assert len(list(out.glob("latents-*.json"))) >= 2


def test_why_a_process_failed_is_one_message() -> None:
    ended = ChildError("the process was ended by SIGKILL", ("encoding", "Killed"), "SIGKILL")
    words = "process 2 of the cache ended by SIGKILL: run again, it goes on; it said: encoding\nKilled"
    assert _failed(1, ended) == words
    assert _failed(1, ChildError("ValueError: odd")) == "a process of the cache failed: ValueError: odd"


def test_ctrl_c_says_what_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "c"

    def interrupt_after(shards: int) -> Any:
        def report(text: str, fraction: float | None = None) -> None:
            if len(list(out.glob("latents-*.json"))) >= shards and "encoding" in text:
                (out / ".latents-00009.safetensors.x.partial").write_text("half")
                raise KeyboardInterrupt

        return report

    with pytest.raises(
        InterruptedRunError, match=r"interrupted: 2 complete shards are kept in .*, the same command goes"
    ):
        run(job(out), report=interrupt_after(2))
    assert not list(out.glob(".*.partial"))
    run(job(out))
    assert len(DiskCache(out)) == 12
    out = tmp_path / "d"
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        run(job(out), report=interrupt_after(0))
    assert not out.exists()


def test_a_cache_counts_captions_that_are_cut(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, caption in (("a", "x" * 90), ("b", "short")):
        Image.new("RGB", (64, 64), "red").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption)
    summary = run(job(tmp_path / "c", data=str(folder), flip=True))
    assert (summary["cut"], summary["flip"]) == (1, True)
    assert DiskCache(tmp_path / "c").cut == 1
    other = job(tmp_path / "c", data=str(folder))
    with pytest.raises(OutputExistsError, match=r"other settings .*flip: there True, asked False"):
        run(other)
    assert run(other, overwrite=True)["flip"] is False
    (folder / "settings.json").write_text("{}")  # which a cache has, too
    with pytest.raises(OutputExistsError, match="already exists"):
        run(job(folder), overwrite=True)
    assert (folder / "a.txt").exists()
