"""Checkpoints: a run that was killed and gone on with ends as if nothing had happened."""

from __future__ import annotations

import json
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

from sdkd.core.files import read_json, write_json
from sdkd.distill import TrainConfig, train
from sdkd.distill.data.latents import LatentCache
from sdkd.distill.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from sdkd.distill.training.run import Job, run
from sdkd.distill.training.trainer import Trainer
from sdkd.errors import InputError, InterruptedRunError, OutputExistsError
from sdkd.models.diffusers_folder import write_pipeline
from sdkd.students.blocks import build_student

SETTINGS: dict[str, Any] = {
    "steps": 4,
    "batch_size": 2,
    "accumulation": 2,
    "precision": "fp32",
    "device": "cpu",
    "log_every": 1,
    "learning_rate": 1e-3,
    "max_images": 7,
    "warmup": 2,
}
UNFINISHED = {"objective": "distill", "unfinished": True, "settings": {}}


def latents(count: int = 7) -> LatentCache:
    mean = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return LatentCache(mean, torch.full_like(mean, 0.1), [f"number {index}" for index in range(count)])


def unet_of(objective: str, pipe: Any) -> UNet2DConditionModel:
    return build_student(pipe.unet, "tiny") if objective == "distill" else helpers.tiny_unet(3)


def trained(objective: str, folder: Path, resume: Path | None = None, **settings: Any) -> dict[str, torch.Tensor]:
    pipe = helpers.tiny_pipeline()
    config = TrainConfig(objective=objective, **(SETTINGS | settings))
    found = train(pipe, unet_of(objective, pipe), latents(), config, folder=folder, resume=resume).unet
    return {name: value.clone() for name, value in found.state_dict().items()}


def losses(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key.startswith("loss") or key == "step"} for row in rows]


VARIANTS: dict[str, dict[str, Any]] = {
    "distill": {"ema": 0.9},
    "finetune": {"snr_gamma": 5.0, "noise_offset": 0.1},
    "lora": {"lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.3},  # dropout draws from torch's global generator
}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, torch.Tensor]]]:
    """By objective: the folder of an uninterrupted run that saved at step 3 of 4, and the weights it ended with."""

    @cache
    def whole(objective: str) -> tuple[Path, dict[str, torch.Tensor]]:
        torch.manual_seed(11)
        folder = tmp_path_factory.mktemp("whole") / objective
        return folder, trained(objective, folder, save_every=3, **VARIANTS[objective])

    return whole


@pytest.mark.parametrize("objective", VARIANTS)
def test_resumed_equals_uninterrupted_bit_for_bit(objective: str, wholes: Any, tmp_path: Path) -> None:
    folder, whole = wholes(objective)
    torch.manual_seed(99)  # what the checkpoint holds must win
    shutil.copytree(folder, tmp_path / "again")
    resume = tmp_path / "again" / "checkpoint-3"
    again = trained(objective, tmp_path / "again", resume, save_every=3, **VARIANTS[objective])
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert losses(tmp_path / "again") == losses(folder)
    assert [row["step"] for row in losses(tmp_path / "again")] == list(range(1, 5))


def test_dropout_is_seeded_by_the_run(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 1, "lora_rank": 2, "lora_dropout": 0.5}
    made = []
    for number in (1, 2):
        torch.manual_seed(number)
        made.append(trained("lora", tmp_path / str(number), **settings))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    other = trained("lora", tmp_path / "other", **(settings | {"lora_dropout": 0.0}))
    assert not all(torch.equal(made[0][name], other[name]) for name in other)


def test_a_run_in_channels_last_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    whole = trained("distill", tmp_path / "whole", save_every=3, channels_last=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    resume = tmp_path / "again" / "checkpoint-3"
    again = trained("distill", tmp_path / "again", resume, save_every=3, channels_last=True)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_layout_may_change_when_a_run_goes_on(wholes: Any, tmp_path: Path) -> None:
    """The optimizer's state follows its parameters' strides: AdamW's fused kernel walks both side by side."""
    folder, whole = wholes("distill")
    shutil.copytree(folder, tmp_path / "again")
    resume = tmp_path / "again" / "checkpoint-3"
    again = trained("distill", tmp_path / "again", resume, channels_last=True, **VARIANTS["distill"])
    for name, value in whole.items():  # other kernels: equal but for rounding
        torch.testing.assert_close(again[name], value, rtol=0, atol=2e-5, msg=name)


def test_a_checkpoint_is_the_students_and_diffusers_reads_it(tmp_path: Path) -> None:
    trained("distill", tmp_path, steps=2, save_every=1, keep=1, ema=0.9)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]  # the last one is there to go on from
    student = UNet2DConditionModel.from_pretrained(tmp_path / "checkpoint-2" / "unet", local_files_only=True)
    averaged = UNet2DConditionModel.from_pretrained(tmp_path / "checkpoint-2" / "unet_ema", local_files_only=True)
    expected = build_student(helpers.tiny_unet(), "tiny")
    assert student.config.layers_per_block == 1
    assert student.config.mid_block_type is None
    assert student.state_dict().keys() == expected.state_dict().keys()  # never the teacher's
    assert not torch.equal(student.conv_in.weight, averaged.conv_in.weight)
    saved = load_file(tmp_path / "checkpoint-2" / "optimizer.safetensors")
    assert len(saved) == 3 * len(list(expected.parameters()))  # step and two moments of each parameter


def test_old_checkpoints_go_and_the_rest_stays(tmp_path: Path) -> None:
    trained("distill", tmp_path, save_every=1, keep=3)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_other_settings_are_refused(wholes: Any, tmp_path: Path) -> None:
    checkpoint = wholes("distill")[0] / "checkpoint-3"
    with pytest.raises(InputError, match=r"other settings \(learning_rate 0.001 -> 0.01, seed 0 -> 1\)"):
        trained("distill", tmp_path, checkpoint, ema=0.9, learning_rate=1e-2, seed=1)
    with pytest.raises(InputError, match="is at step 3, beyond --steps 2"):
        trained("distill", tmp_path, checkpoint, ema=0.9, steps=2)


def test_a_damaged_checkpoint_names_the_one_before(tmp_path: Path) -> None:
    trained("distill", tmp_path, save_every=1, steps=2)
    newest = tmp_path / "checkpoint-2"
    flipped = newest / "optimizer.safetensors"
    data = flipped.read_bytes()
    flipped.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    with pytest.raises(InputError, match=r"was changed in optimizer.safetensors: delete it, and go on from .*int-1$"):
        trained("distill", tmp_path, newest)
    shutil.copytree(tmp_path, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / newest.name)  # as the message says
    trained("distill", tmp_path / "copy", tmp_path / "copy" / "checkpoint-1", steps=2)
    flipped.write_bytes(data)
    record = newest / "checkpoint.json"
    record.write_text(record.read_text().replace('"step": 2', '"step": 1'))
    with pytest.raises(InputError, match=r"was changed in checkpoint\.json: delete it, and go on from the one before"):
        trained("distill", tmp_path, newest)
    (tmp_path / "checkpoint-1" / "checkpoint.json").write_text("{")
    with pytest.raises(
        InputError, match=r"checkpoint-1' cannot be read .*: delete it, and start over with --overwrite"
    ):
        trained("distill", tmp_path, tmp_path / "checkpoint-1")


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    pipe = helpers.tiny_pipeline()
    trainer = Trainer(pipe, build_student(pipe.unet, "tiny"), latents(), TrainConfig(**SETTINGS))
    trainer.step()
    first = save_checkpoint(trainer, tmp_path)
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    trainer.step()
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(trainer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert all(path.read_bytes() == content for path, content in before.items())
    load_checkpoint(trainer, first)
    assert trainer.done == 1


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume") / "teacher"
    write_pipeline(helpers.tiny_pipeline(), path)
    return path


def test_killed_and_resumed_equals_uninterrupted(teacher: Path, tmp_path: Path) -> None:
    settings = {"student": "tiny", "steps": 12, "save_every": 3, "ema": 0.9, "accumulation": 1, "warmup": 0}
    job = Job(str(teacher), "demo", tmp_path / "whole", TrainConfig(**(SETTINGS | settings)))
    run(job)
    killed = replace(job, output=tmp_path / "killed")
    given = {"teacher": teacher, "data": "demo", "output": killed.output}
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
    file = "unet/diffusion_pytorch_model.safetensors"
    whole, resumed = load_file(job.output / file), load_file(killed.output / file)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert losses(killed.output) == losses(job.output)


def test_ctrl_c_keeps_what_was_saved(teacher: Path, tmp_path: Path) -> None:
    def report(message: str, fraction: float | None) -> None:
        if message.startswith("step 3"):
            raise KeyboardInterrupt

    config = TrainConfig(**(SETTINGS | {"save_every": 2}))
    job = Job(str(teacher), "demo", tmp_path / "out", config)
    with pytest.raises(InterruptedRunError, match=r"checkpoint-2 is kept, go on from it .* --resume auto"):
        run(job, report)
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    with pytest.raises(OutputExistsError, match="holds checkpoints of a run"):
        run(job)
    done = run(Job(str(teacher), "demo", tmp_path / "out", config, resume="auto"))
    assert done["steps"] == 4
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_overwrite_keeps_the_old_until_the_new_is_whole(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    old = {"teacher": "demo", "student": "sd-tiny"}
    write_json(tmp_path / "out" / "sdkd.json", old)
    write_json(tmp_path / "out" / "checkpoint-9" / "checkpoint.json", {})

    def report(message: str, fraction: float | None) -> None:
        assert read_json(tmp_path / "out" / "sdkd.json") == old
        if message.startswith(stop):
            raise KeyboardInterrupt("stop")

    stop = "step 1"
    config = TrainConfig(**(SETTINGS | {"save_every": 2}))
    job = Job(str(teacher), "demo", tmp_path / "out", config, overwrite=True)
    with pytest.raises(KeyboardInterrupt, match=r"^stop$"):
        run(job, report)
    assert read_json(tmp_path / "out" / "sdkd.json") == old
    assert {path.name for path in tmp_path.iterdir()} <= {"out", ".out.lock"}
    stop = "step 3"
    with pytest.raises(InterruptedRunError, match=r"checkpoint-2 is kept, go on from it"):
        run(job, report)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"sdkd.json", "checkpoint-9"}
    stop = "never"
    run(replace(job, resume="auto"), report)
    assert {path.name for path in tmp_path.iterdir()} <= {"out", ".out.lock"}
    assert read_json(tmp_path / "out" / "sdkd.json")["steps"] == 4
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2", "checkpoint-4"]
    assert losses(tmp_path / "out")[-1]["step"] == 4


def test_a_run_killed_before_its_first_checkpoint_starts_over(teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = Job(str(teacher), "demo", out, TrainConfig(**SETTINGS), resume="auto")
    write_json(out / "sdkd.json", UNFINISHED)
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"holds 'thesis\.txt' beside"):
        run(job)
    (out / "thesis.txt").unlink()
    (out / "sdkd.json").unlink()  # as of runs before they had a record from the start
    (out / "training.jsonl").write_text('{"step": 1, "loss/total": 2.5, "lr": 0.001}\n')
    (out / ".training.jsonl.12345678.partial").write_text("half")
    with pytest.raises(OutputExistsError, match="already exists: choose another folder or pass --overwrite"):
        run(replace(job, resume="never"))
    assert run(job)["steps"] == 4
    assert not list(tmp_path.rglob("*.partial"))
    assert "unfinished" not in read_json(out / "sdkd.json")
    assert "was finished before" in run(job)["remarks"][0]  # a whole model is no unfinished run


def test_a_hidden_folder_of_others_stays(teacher: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "out" / "sdkd.json", UNFINISHED)
    (tmp_path / ".out.new").mkdir()
    (tmp_path / ".out.new" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"\.out\.new' already exists, and sdkd did not write"):
        run(Job(str(teacher), "demo", tmp_path / "out", TrainConfig(**SETTINGS), overwrite=True))
    assert (tmp_path / ".out.new" / "thesis.txt").read_text() == "mine"


def test_a_run_replaces_no_input(teacher: Path) -> None:
    config = TrainConfig(**SETTINGS)
    for output, word in ((teacher, "is"), (teacher.parent, "holds"), (teacher / "unet", "lies in")):
        for given in ("model", "data", "init"):
            job = Job(**({"model": "demo", "data": "demo"} | {given: str(teacher)}), output=output, config=config)
            with pytest.raises(InputError, match=f"output .* {word} the input"):
                run(replace(job, overwrite=True))


def test_resume_names_what_is_wrong(teacher: Path, tmp_path: Path) -> None:
    job = Job(str(teacher), "demo", tmp_path / "out", TrainConfig(**SETTINGS), resume=str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="is no checkpoint: give auto, never, or OUTPUT/checkpoint-<step>"):
        run(job)
