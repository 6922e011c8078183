"""Checkpoints: a run that was killed and gone on with ends as if nothing had happened."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from diffusers import UNet2DConditionModel
from processes import kill, started
from safetensors.torch import load_file
from training_runs import RUN, job, latents, losses, same, teacher, trainer, weights

from sdkd.core.files import read_json, write_json
from sdkd.distill import TrainConfig, train
from sdkd.distill.training import loop
from sdkd.distill.training.checkpoint import load_checkpoint, save_checkpoint
from sdkd.distill.training.record import checkpoints
from sdkd.distill.training.run import Job, run
from sdkd.errors import InputError, InterruptedRunError, OutputExistsError
from sdkd.students.blocks import build_student

SETTINGS: dict[str, Any] = RUN | {"steps": 4, "accumulation": 2, "learning_rate": 1e-3, "max_images": 7, "warmup": 2}


def trained(objective: str, folder: Path, resume: Path | None = None, **settings: Any) -> dict[str, torch.Tensor]:
    pipe = helpers.tiny_pipeline()
    is_student = objective in ("distill", "consistency")
    unet = build_student(pipe.unet, "tiny") if is_student else helpers.tiny_unet(3)
    config = TrainConfig(objective=objective, **(SETTINGS | VARIANTS[objective] | settings))
    return weights(train(pipe, unet, latents(), config, folder=folder, resume=resume).unet)


VARIANTS: dict[str, dict[str, Any]] = {
    "distill": {"ema": 0.9},
    "finetune": {"snr_gamma": 5.0, "noise_offset": 0.1},
    "lora": {"lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.3},  # dropout draws from torch's global generator
    "consistency": {"target_ema": 0.9},
}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, torch.Tensor]]]:
    """By objective: the folder of an uninterrupted run, with its checkpoints 3 and 4, and the weights it ended with."""

    @cache
    def whole(objective: str) -> tuple[Path, dict[str, torch.Tensor]]:
        torch.manual_seed(11)
        folder = tmp_path_factory.mktemp("whole") / objective
        return folder, trained(objective, folder, save_every=1)

    return whole


@pytest.mark.parametrize("objective", VARIANTS)
def test_resumed_equals_uninterrupted_bit_for_bit(objective: str, wholes: Any, tmp_path: Path) -> None:
    folder, whole = wholes(objective)
    torch.manual_seed(99)  # what the checkpoint holds must win
    shutil.copytree(folder, tmp_path / "again")
    again = trained(objective, tmp_path / "again", tmp_path / "again" / "checkpoint-3", save_every=1)
    assert same(again, whole)
    assert losses(tmp_path / "again") == losses(folder)
    assert [row["step"] for row in losses(tmp_path / "again")] == list(range(1, 5))


def test_dropout_is_seeded_by_the_run(tmp_path: Path) -> None:
    made = []
    for number, dropout in ((1, 0.5), (2, 0.5), (3, 0.0)):
        torch.manual_seed(number)
        made.append(trained("lora", tmp_path / str(number), steps=1, lora_dropout=dropout))
    assert (same(made[0], made[1]), same(made[0], made[2])) == (True, False)


def test_the_layout_may_change_when_a_run_goes_on(wholes: Any, tmp_path: Path) -> None:
    """The optimizer's state follows its parameters' strides: AdamW's fused kernel walks both side by side."""
    folder, whole = wholes("distill")
    shutil.copytree(folder, tmp_path / "again")
    again = trained("distill", tmp_path / "again", tmp_path / "again" / "checkpoint-3", channels_last=True)
    for name, value in whole.items():  # other kernels: equal but for rounding
        torch.testing.assert_close(again[name], value, rtol=0, atol=2e-5, msg=name)


def test_checkpoints_are_the_students_last_ones_and_diffusers_reads_them(wholes: Any) -> None:
    found = checkpoints(wholes("distill")[0])
    assert [path.name for path in found] == ["checkpoint-3", "checkpoint-4"]  # the last one is there to go on from
    student, averaged = (
        UNet2DConditionModel.from_pretrained(found[1] / name, local_files_only=True) for name in ("unet", "unet_ema")
    )
    expected = build_student(helpers.tiny_unet(), "tiny")
    assert student.config.layers_per_block == 1
    assert student.config.mid_block_type is None
    assert student.state_dict().keys() == expected.state_dict().keys()  # never the teacher's
    assert not torch.equal(student.conv_in.weight, averaged.conv_in.weight)
    saved = load_file(found[1] / "optimizer.safetensors")
    assert len(saved) == 3 * len(list(expected.parameters()))  # step and two moments of each parameter


def test_a_damaged_checkpoint_names_the_one_before(wholes: Any, tmp_path: Path) -> None:
    shutil.copytree(wholes("distill")[0], tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoint-4"
    flipped, record = newest / "optimizer.safetensors", newest / "checkpoint.json"
    data = flipped.read_bytes()
    flipped.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    with pytest.raises(InputError, match=r"was changed in optimizer.safetensors: delete it, and go on from .*int-3$"):
        trained("distill", tmp_path, newest)
    record.write_text(record.read_text().replace('"step": 4', '"step": 3'))
    with pytest.raises(InputError, match=r"was changed in checkpoint\.json: delete it, and go on from the one before"):
        trained("distill", tmp_path, newest)
    (tmp_path / "checkpoint-3" / "checkpoint.json").write_text("{")
    with pytest.raises(InputError, match=r"checkpoint-3' cannot be read .*: delete it, and start over with --overwr"):
        trained("distill", tmp_path, tmp_path / "checkpoint-3")


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    one = trainer()
    one.step()
    first = save_checkpoint(one, tmp_path)
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    one.step()
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(one, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert all(path.read_bytes() == content for path, content in before.items())
    longer = trainer(steps=8)
    load_checkpoint(longer, first)
    assert longer.done == 1
    assert longer.optimizer.param_groups[0]["lr"] == longer.learning_rate > 0.9 * longer.config.learning_rate


def test_a_disk_too_full_for_the_last_checkpoint_does_not_cost_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(one: Any, *_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", f"at step {one.done}")

    monkeypatch.setattr(loop, "save_checkpoint", full)
    pipe = helpers.tiny_pipeline()
    unet = build_student(pipe.unet, "tiny")
    done = train(pipe, unet, latents(), TrainConfig(**RUN), folder=tmp_path)
    assert done.notes == ("the disk was too full for a last checkpoint: this run cannot be gone on with",)
    assert done.unet is unet
    with pytest.raises(OSError, match="at step 1"):
        train(pipe, unet, latents(), TrainConfig(**RUN, save_every=1), folder=tmp_path)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    settings = {"student": "tiny", "steps": 6, "save_every": 2, "ema": 0.9, "accumulation": 1, "warmup": 0}
    whole = job(tmp_path / "whole", data="demo", **(SETTINGS | settings))
    run(whole)
    killed = replace(whole, output=tmp_path / "killed")
    given = {"teacher": teacher(), "data": "demo", "output": killed.output}
    options = {**given, **SETTINGS, **settings}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    process = started(["distill", *words], tmp_path / "log")
    end = time.monotonic() + 120
    while not checkpoints(killed.output) and time.monotonic() < end and process.is_alive():
        time.sleep(0.01)
    kill(process)
    assert checkpoints(killed.output)
    assert not (killed.output / "model_index.json").exists()
    with pytest.raises(OutputExistsError, match="holds checkpoints of a run: go on with --resume auto"):
        run(killed)
    run(replace(killed, resume="auto"))
    assert same(weights(killed.output), weights(whole.output))
    assert losses(killed.output) == losses(whole.output)


def stopped_at(step: int) -> Callable[[str, float | None], None]:
    def report(message: str, fraction: float | None) -> None:
        if message.startswith(f"step {step}"):
            raise KeyboardInterrupt("stop")

    return report


def test_ctrl_c_keeps_what_was_saved(tmp_path: Path) -> None:
    one = job(tmp_path / "out", **(SETTINGS | {"save_every": 2}))
    with pytest.raises(KeyboardInterrupt, match=r"^stop$"):
        run(one, stopped_at(1))
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []
    with pytest.raises(InterruptedRunError, match=r"checkpoint-2 is kept, go on from it .* --resume auto"):
        run(one, stopped_at(3))
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    with pytest.raises(OutputExistsError, match="holds checkpoints of a run"):
        run(one)
    assert run(replace(one, resume="auto"))["steps"] == 4
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_overwrite_keeps_the_old_until_the_new_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    old = {"teacher": "demo", "student": "sd-tiny"}
    write_json(out / "sdkd.json", old)
    write_json(out / "checkpoint-9" / "checkpoint.json", {})

    def report(message: str, fraction: float | None) -> None:
        assert read_json(out / "sdkd.json") == old
        stopped_at(stop)(message, fraction)

    one = job(out, overwrite=True, **(SETTINGS | {"save_every": 2}))
    stop = 1
    with pytest.raises(KeyboardInterrupt, match=r"^stop$"):
        run(one, report)
    assert read_json(out / "sdkd.json") == old
    assert {path.name for path in tmp_path.iterdir()} <= {"out", ".out.lock"}
    stop = 3
    with pytest.raises(InterruptedRunError, match=r"checkpoint-2 is kept, go on from it"):
        run(one, report)
    assert {path.name for path in out.iterdir()} == {"sdkd.json", "checkpoint-9"}
    stop = 9
    run(replace(one, resume="auto"), report)
    assert {path.name for path in tmp_path.iterdir()} <= {"out", ".out.lock"}
    assert read_json(out / "sdkd.json")["steps"] == 4
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2", "checkpoint-4"]
    assert losses(out)[-1]["step"] == 4


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path: Path) -> None:
    out, killed = tmp_path / "out", tmp_path / "killed"

    def report(message: str, fraction: float | None) -> None:
        if message.startswith("step 1 of"):
            shutil.copytree(out, killed)  # what a kill at this moment leaves

    run(job(out), report)
    again = job(killed, resume="auto")
    (killed / ".training.jsonl.12345678.partial").write_text("half")
    (killed / "thesis.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"holds 'thesis\.txt' beside"):
        run(again)
    (killed / "thesis.txt").unlink()
    with pytest.raises(OutputExistsError, match="already exists: choose another folder or pass --overwrite"):
        run(replace(again, resume="never"))
    run(again)
    assert same(weights(killed), weights(out))
    assert not list(tmp_path.rglob("*.partial"))
    assert "unfinished" not in read_json(killed / "sdkd.json")
    assert "was finished before" in run(again)["remarks"][0]
    for path in checkpoints(killed):
        shutil.rmtree(path)
    with pytest.raises(OutputExistsError, match="already exists"):  # a whole model is no unfinished run
        run(again)


def test_what_stands_in_the_way_is_named_and_stays(tmp_path: Path) -> None:
    write_json(tmp_path / "out" / "sdkd.json", {"objective": "distill", "unfinished": True, "settings": {}})
    (tmp_path / ".out.new").mkdir()
    (tmp_path / ".out.new" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"\.out\.new' already exists, and sdkd did not write"):
        run(job(tmp_path / "out", overwrite=True))
    assert (tmp_path / ".out.new" / "thesis.txt").read_text() == "mine"
    with pytest.raises(InputError, match="is no checkpoint: give auto, never, or OUTPUT/checkpoint-<step>"):
        run(job(tmp_path / "new", resume=tmp_path / "nothing"))
    own = teacher()
    for output, word in ((own, "is"), (own.parent, "holds"), (own / "unet", "lies in")):
        for given in ("model", "data", "init"):
            one = Job(**({"model": "demo", "data": "demo"} | {given: str(own)}), output=output, config=TrainConfig())
            with pytest.raises(InputError, match=f"output .* {word} the input"):
                run(replace(one, overwrite=True))
