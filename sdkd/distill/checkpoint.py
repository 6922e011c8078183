"""Checkpoints of a run: complete or absent, readable by diffusers, and enough to go on as if nothing had happened.

    checkpoint-500/unet/                  the student as diffusers saves it (a LoRA: lora/)
    checkpoint-500/unet_ema/              the averaged weights, likewise
    checkpoint-500/optimizer.safetensors  state tensors of the optimizer, "<parameter>.<name>"
    checkpoint-500/random.safetensors     states of torch's global generators of every process (dropout draws from them)
    checkpoint-500/checkpoint.json        step, settings, and every other number

What is random about the samples needs no state: it is drawn from the seed and the sample's position (see draws.py).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdkd.distill.setup import lay_out_state
from sdkd.errors import InputError
from sdkd.files import new_folder, read_json, write_json

if TYPE_CHECKING:
    from sdkd.distill.trainer import Trainer

RECORD = "checkpoint.json"
SCHEMA = 1
_NAME = re.compile(r"checkpoint-(\d+)")
# Settings that may change when a run goes on: they do not touch what was learnt so far.
_FREE = {
    *("steps", "log_every", "save_every", "keep", "prompts", "sample_every", "sample_steps", "trackers", "workers"),
    *("device", "compile", "checkpointing", "channels_last"),
}


def checkpoint_path(folder: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return folder / f"checkpoint-{step}"


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and (path / RECORD).is_file()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done at a checkpoint, from its name."""
    match = _NAME.fullmatch(checkpoint.name)
    if not match:
        raise InputError(f"folder {str(checkpoint)!r} is no checkpoint: give one named checkpoint-<step>")
    return int(match[1])


def save_checkpoint(trainer: Trainer, folder: Path, log: Mapping[str, Any] | None = None) -> Path:
    """Write a checkpoint, then delete those beyond `keep`; every process must call it, the first one writes.

    `log` is what the log has counted since its last record.

    OSError (no space, for one) leaves the checkpoints that were there.
    """
    path = checkpoint_path(folder, trainer.done)
    states = _random_states(trainer)
    if trainer.accelerator.is_main_process:
        with new_folder(path, overwrite=True) as partial:
            _write(trainer, partial, states, log)
        for old in checkpoints(folder)[: -trainer.config.keep]:
            shutil.rmtree(old)
    trainer.accelerator.wait_for_everyone()
    return path


def _write(trainer: Trainer, folder: Path, states: Mapping[str, torch.Tensor], log: Mapping[str, Any] | None) -> None:
    from safetensors.torch import save_file

    _save_unet(trainer, folder, "unet")
    if trainer.ema is not None:
        with trainer.averaged():
            _save_unet(trainer, folder, "unet_ema")
    tensors, numbers = _split(trainer.optimizer.state_dict())
    save_file(tensors, folder / "optimizer.safetensors")
    save_file(dict(states), folder / "random.safetensors")
    scaler = trainer.accelerator.scaler
    record = {
        "schema": SCHEMA,
        "step": trainer.done,
        "processes": trainer.accelerator.num_processes,
        "settings": trainer.config.to_json(),
        "optimizer": numbers,
        "schedule": {key: value for key, value in trainer.schedule.state_dict().items() if key != "lr_lambdas"},
        "scaler": scaler.state_dict() if scaler is not None else None,
        "log": log,
        "ema_steps": trainer.ema.optimization_step if trainer.ema is not None else None,
    }
    write_json(folder / RECORD, record)


def _save_unet(trainer: Trainer, folder: Path, name: str) -> None:
    from sdkd.pipelines import quiet_libraries

    if trainer.config.objective == "lora":
        from sdkd.distill.lora import save_lora

        save_lora(trainer.unet, folder / name.replace("unet", "lora"))
        return
    with quiet_libraries():
        trainer.unet.save_pretrained(folder / name)


def _split(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
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


def _joined(tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `_split`."""
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

    InputError when the checkpoint is of another run, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    record = _read_record(trainer, path)
    try:
        _load_weights(trainer, path)
        trainer.optimizer.load_state_dict(_joined(load_file(path / "optimizer.safetensors"), record["optimizer"]))
        lay_out_state(trainer.optimizer.state)
        states = load_file(path / "random.safetensors")
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(
            f"checkpoint {str(path)!r} cannot be read ({error}): delete it, and go on from the one before with --resume"
        ) from error
    trainer.schedule.load_state_dict(record["schedule"] | {"lr_lambdas": [None]})
    if record["scaler"] and trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler.load_state_dict(record["scaler"])
    rank = trainer.accelerator.process_index
    torch.set_rng_state(states[f"cpu.{rank}"])
    if f"cuda.{rank}" in states and trainer.device.type == "cuda":
        torch.cuda.set_rng_state(states[f"cuda.{rank}"], trainer.device)
    trainer.done = record["step"]
    trainer.batches.start(trainer.done)
    return record


def _read_record(trainer: Trainer, path: Path) -> dict[str, Any]:
    record = dict(read_json(path / RECORD))
    if record.get("schema") != SCHEMA:
        raise InputError(f"checkpoint {str(path)!r} has schema {record.get('schema')}, this sdkd reads {SCHEMA}")
    import json

    now = json.loads(json.dumps(trainer.config.to_json() | {"processes": trainer.accelerator.num_processes}))
    then = record["settings"] | {"processes": record["processes"]}
    changed = [key for key in now if key not in _FREE and now[key] != then.get(key)]
    if changed:
        listed = ", ".join(f"{key} {then.get(key)!r} -> {now[key]!r}" for key in changed)
        raise InputError(
            f"checkpoint {str(path)!r} is of a run with other settings ({listed}): give the same again, or start anew "
            "with --overwrite"
        )
    if trainer.config.steps < record["step"]:
        raise InputError(
            f"checkpoint {str(path)!r} is at step {record['step']}, beyond --steps {trainer.config.steps}: ask for more"
        )
    return record


def _load_weights(trainer: Trainer, path: Path) -> None:
    names = [name for name, parameter in trainer.unet.named_parameters() if parameter.requires_grad]
    _copy(trainer.parameters, names, _read_weights(trainer, path, "unet"))
    if trainer.ema is not None:
        record = read_json(path / RECORD)
        _copy(trainer.ema.shadow_params, names, _read_weights(trainer, path, "unet_ema"))
        trainer.ema.optimization_step = record["ema_steps"]


def _read_weights(trainer: Trainer, path: Path, name: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    if trainer.config.objective == "lora":
        from sdkd.distill.lora import read_lora

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
