"""Checkpoints of a run: complete or absent, readable by diffusers, and enough to go on as if nothing had happened.

    checkpoint-500/unet/                  the student as diffusers saves it (a LoRA: lora/)
    checkpoint-500/unet_ema/              the averaged weights, likewise
    checkpoint-500/target.safetensors     weights of consistency's target network, where it is an average, too
    checkpoint-500/calibration.safetensors  what a run with rounding rounds by
    checkpoint-500/optimizer.safetensors  state tensors of the optimizer, "<parameter>.<name>"
    checkpoint-500/random.safetensors     states of torch's global generators of every process (dropout draws from them)
    checkpoint-500/checkpoint.json        step, settings, every other number, digests of data, model and files

What is random about the samples needs no state: it is drawn from the seed and the sample's position (see order.py).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from safetensors.torch import load_file, save_file

from sdkd.core.files import new_folder, write_json
from sdkd.distill.training.card import named
from sdkd.distill.training.finite import SkippedSteps, check_weights
from sdkd.distill.training.log import LogState
from sdkd.distill.training.record import Record, check_files, damaged, keep_newest, read_record, write_record
from sdkd.distill.training.rounding import FILE
from sdkd.distill.training.setup import lay_out_state
from sdkd.errors import InputError, ModelError
from sdkd.models.checkpoint import BASE
from sdkd.models.diffusers_folder import PROVENANCE
from sdkd.models.generation import entry
from sdkd.quantization.calibration import Calibration

if TYPE_CHECKING:
    from sdkd.distill.training.config import TrainConfig
    from sdkd.distill.training.trainer import Trainer

_TARGET = "target.safetensors"
# Settings that may change when a run goes on: they do not touch what was learnt so far.
_FREE = {
    *("steps", "log_every", "save_every", "keep", "prompts", "sample_every", "sample_steps", "trackers", "workers"),
    *("device", "compile", "checkpointing", "channels_last"),
}


class _Optimizer(TypedDict):
    param_groups: list[dict[str, Any]]
    state: dict[str, dict[str, Any]]


class _Skipped(TypedDict):
    total: int
    row: int


class UNetRecord(Record):
    """checkpoint.json of a UNet's run."""

    processes: int
    optimizer: _Optimizer
    schedule: dict[str, Any]
    scaler: dict[str, Any] | None
    ema_steps: int | None
    log: LogState | None
    skipped: _Skipped


def save_checkpoint(trainer: Trainer, folder: Path, log: LogState | None = None) -> Path:
    """Write a checkpoint, then delete those beyond `keep`; every process must call it, the first one writes.

    `log` is what the log has counted since its last record. Checkpoints of later steps go, too: they are of a run that
    was left at this one. OSError (no space, for one) and NotFiniteError leave the checkpoints that were there.
    """
    path = folder / f"checkpoint-{trainer.done}"
    states = _random_states(trainer)
    if trainer.accelerator.is_main_process:
        with new_folder(path, overwrite=True) as partial:
            _write(trainer, partial, states, log)
        keep_newest(path, trainer.config.keep)
    trainer.accelerator.wait_for_everyone()
    return path


def _write(trainer: Trainer, folder: Path, states: Mapping[str, torch.Tensor], log: LogState | None) -> None:
    tensors, numbers = split_state(trainer.optimizer.state_dict())
    check_weights(trainer.named_parameters() | tensors, trainer.done)
    config, origin = trainer.config, trainer.origin
    about: dict[str, Any] = {BASE: origin.model, "objective": config.objective, "steps": trainer.done}
    about |= named(config, origin.model, origin.teacher) | entry(config.generation(origin.generation))
    write_json(folder / PROVENANCE, about)  # by it, `resolve` knows the parts that belong to its UNet
    _save_unet(trainer, folder, "unet")
    if trainer.ema is not None:
        with trainer.averaged():
            _save_unet(trainer, folder, "unet_ema")
    if trainer.target is not None:
        own = {name: value.contiguous() for name, value in trainer.target.unet.state_dict().items()}
        save_file(own, folder / _TARGET)
    if trainer.calibration is not None:
        trainer.calibration.save(folder / FILE)
    save_file(tensors, folder / "optimizer.safetensors")
    save_file(dict(states), folder / "random.safetensors")
    scaler = trainer.accelerator.scaler
    record = {
        "step": trainer.done,
        "processes": trainer.accelerator.num_processes,
        "settings": trainer.config.to_json(),
        "digests": trainer.digests,
        "optimizer": numbers,
        "schedule": {key: value for key, value in trainer.schedule.state_dict().items() if key != "lr_lambdas"},
        "scaler": scaler.state_dict() if scaler is not None else None,
        "log": log,
        "ema_steps": trainer.ema.optimization_step if trainer.ema is not None else None,
        "skipped": vars(trainer.skips),
    }
    write_record(folder, record)


def _save_unet(trainer: Trainer, folder: Path, name: str) -> None:
    from sdkd.models.diffusers_folder import quiet_libraries

    if trainer.config.kind.lora:
        from sdkd.distill.training.lora import save_lora

        run = trainer.config.generation(trainer.origin.generation)
        save_lora(trainer.unet, folder / name.replace("unet", "lora"), entry(run))
        return
    with quiet_libraries():
        trainer.unet.save_pretrained(folder / name)


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state as tensors "<parameter>.<name>" and as JSON."""
    tensors: dict[str, torch.Tensor] = {}
    others: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
            else:
                others.setdefault(str(index), {})[name] = value
    return tensors, {"param_groups": state["param_groups"], "state": others}


def join_state(tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `split_state`."""
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in numbers["state"].items()}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    return {"param_groups": numbers["param_groups"], "state": state}


def _random_states(trainer: Trainer) -> dict[str, torch.Tensor]:
    """States of torch's global generators of all processes, by name and rank."""
    from accelerate.utils import gather_object

    own = {"cpu": torch.get_rng_state()}
    if trainer.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(trainer.device)
    every = gather_object([own]) if trainer.accelerator.num_processes > 1 else [own]
    return {f"{name}.{rank}": state for rank, states in enumerate(every) for name, state in states.items()}


def load_checkpoint(trainer: Trainer, path: Path) -> dict[str, Any]:
    """Put a run where a checkpoint left it and return its record.

    InputError when the checkpoint is of another run, of other data or another model, or damaged.
    """
    from safetensors import SafetensorError

    record = read_record(path, UNetRecord)
    check_settings(path, record, trainer.config, trainer.accelerator.num_processes)
    _check_digests(trainer, path, record)
    check_files(path, record)
    rank = trainer.accelerator.process_index
    try:
        _load_weights(trainer, path, record)
        trainer.optimizer.load_state_dict(join_state(load_file(path / "optimizer.safetensors"), record["optimizer"]))
        lay_out_state(trainer.optimizer.state)
        states = load_file(path / "random.safetensors")
        _load_schedule(trainer, record)
        if record["scaler"] and trainer.accelerator.scaler is not None:
            trainer.accelerator.scaler.load_state_dict(record["scaler"])
        torch.set_rng_state(states[f"cpu.{rank}"])
        if f"cuda.{rank}" in states and trainer.device.type == "cuda":
            torch.cuda.set_rng_state(states[f"cuda.{rank}"], trainer.device)
        trainer.skips = SkippedSteps(**record["skipped"])
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise damaged(path, f"cannot be read ({error})") from error
    trainer.done = record["step"]
    trainer.batches.start(trainer.done)
    return record


def kept_calibration(path: Path, config: TrainConfig, processes: int) -> Calibration:
    """What a run with rounding goes on rounding by; InputError as `load_checkpoint`."""
    check_settings(path, read_record(path, UNetRecord), config, processes)
    try:
        return Calibration.load(path / FILE)
    except ModelError as error:
        raise damaged(path, f"cannot be gone on with ({error})") from error


def _load_schedule(trainer: Trainer, record: Mapping[str, Any]) -> None:
    """The schedule's place, and the rates that the run's own settings give there: `steps` may have changed."""
    schedule = trainer.schedule
    schedule.load_state_dict({**record["schedule"], "lr_lambdas": [None]})
    rates = [base * schedule.lr_lambdas[0](schedule.last_epoch) for base in schedule.base_lrs]
    for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def way_on(path: Path) -> str:
    """How to start another run from a checkpoint's weights."""
    command = shlex.join(["--init", str(path), "--output", f"{path.parent}-2"])
    return f"from the weights of {str(path)!r} in another folder: {command}"


def check_settings(path: Path, record: Mapping[str, Any], config: TrainConfig, processes: int) -> None:
    """InputError when a run of other settings would go on from a checkpoint."""
    now = json.loads(json.dumps(config.to_json() | {"processes": processes}))
    then = record["settings"] | {"processes": record["processes"]}
    changed = [key for key in now if key not in _FREE and now[key] != then.get(key)]
    if changed:
        listed = ", ".join(f"{key} {then.get(key)!r} -> {now[key]!r}" for key in changed)
        raise InputError(
            f"checkpoint {str(path)!r} is of a run with other settings ({listed}): give the same again, or start over "
            f"{way_on(path)}"
        )
    if config.steps < record["step"]:
        raise InputError(
            f"checkpoint {str(path)!r} is at step {record['step']}, beyond --steps {config.steps}: ask for more"
        )


def _check_digests(trainer: Trainer, path: Path, record: Mapping[str, Any]) -> None:
    """InputError when data or model are not those that the checkpoint was trained with."""
    now, then = trainer.digests, record["digests"]
    if changed := [name for name in now | then if now.get(name) != then.get(name)]:
        others = " and ".join("other data" if name == "data" else f"another {name}" for name in changed)
        raise InputError(
            f"checkpoint {str(path)!r} was trained with {others}: give the same again, or start over {way_on(path)}"
        )


def start_from(trainer: Trainer, adapter: Mapping[str, torch.Tensor]) -> None:
    """Give a LoRA the weights of another of the same layers; InputError when it is of others."""
    names = list(trainer.named_parameters())
    try:
        _copy(trainer.parameters, names, adapter)
    except (KeyError, RuntimeError) as error:
        raise InputError(
            f"the LoRA to start from is not of the layers and rank that are to be trained ({error}): give the rank, "
            "alpha and targets that it was made with"
        ) from error


def _load_weights(trainer: Trainer, path: Path, record: Mapping[str, Any]) -> None:
    names = [name for name, parameter in trainer.unet.named_parameters() if parameter.requires_grad]
    _copy(trainer.parameters, names, _read_weights(trainer, path, "unet"))
    if trainer.ema is not None:
        _copy(trainer.ema.shadow_params, names, _read_weights(trainer, path, "unet_ema"))
        trainer.ema.optimization_step = record["ema_steps"]
    if trainer.target is not None:
        _copy(trainer.averages["target"], names, load_file(path / _TARGET))


def _read_weights(trainer: Trainer, path: Path, name: str) -> dict[str, torch.Tensor]:
    if trainer.config.kind.lora:
        from sdkd.students.lora_file import read_lora

        return read_lora(path / name.replace("unet", "lora"))[0]
    found: dict[str, torch.Tensor] = {}
    for file in sorted((path / name).glob("diffusion_pytorch_model*.safetensors")):  # several when it is large
        found |= load_file(file)
    return found


@torch.no_grad()
def _copy(targets: list[Any], names: list[str], weights: Mapping[str, torch.Tensor]) -> None:
    """Into the memory that is there: the optimizer and a data-parallel wrapper hold on to it."""
    for target, name in zip(targets, names, strict=True):
        key = name if name in weights else "unet." + name.replace(".default.", ".")  # PEFT names the adapter
        target.copy_(weights[key])
