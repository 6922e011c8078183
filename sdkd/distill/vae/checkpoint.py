"""Checkpoints of a run that trains a small VAE: what it takes to go on as if nothing had happened.

    checkpoint-500/vae/                   as diffusers saves it
    checkpoint-500/optimizer.safetensors  state tensors of the optimizer, "<parameter>.<name>"
    checkpoint-500/checkpoint.json        step, settings, log, digests of teacher, data and files, and its own

What is random hangs on the seed and the sample's position (sdkd/distill/data/order.py), and needs no state.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkd.core.files import new_folder
from sdkd.distill.training.checkpoint import join_state, split_state
from sdkd.distill.training.finite import check_weights
from sdkd.distill.training.log import LogState
from sdkd.distill.training.record import Record, check_files, keep_newest, read_record, write_record
from sdkd.distill.training.setup import lay_out_state
from sdkd.errors import InputError
from sdkd.models.diffusers_folder import quiet_libraries

if TYPE_CHECKING:
    from sdkd.distill.vae.trainer import VaeTrainer

_WEIGHTS, _OPTIMIZER = "vae/diffusion_pytorch_model.safetensors", "optimizer.safetensors"
# Settings that may change when a run goes on: they do not touch what was learnt so far.
_FREE = {"steps", "log_every", "save_every", "keep", "workers", "device"}


class _VaeRecord(Record):
    """checkpoint.json of a small VAE's run."""

    optimizer: dict[str, Any]
    log: LogState


def save_checkpoint(trainer: VaeTrainer, folder: Path, log: LogState, digests: Mapping[str, str]) -> None:
    """Write a checkpoint whole or not at all, then delete those of later steps, and those beyond `keep`."""
    from safetensors.torch import save_file

    tensors, numbers = split_state(trainer.optimizer.state_dict())
    check_weights(dict(trainer.vae.named_parameters()) | tensors, trainer.done)
    path = folder / f"checkpoint-{trainer.done}"
    with new_folder(path, overwrite=True) as partial:
        with quiet_libraries():
            trainer.vae.save_pretrained(partial / "vae")
        save_file(tensors, partial / _OPTIMIZER)
        values = {"step": trainer.done, "settings": trainer.config.to_json(), "digests": dict(digests), "log": log}
        write_record(partial, values | {"optimizer": numbers})
    keep_newest(path, trainer.config.run.keep)


def load_checkpoint(trainer: VaeTrainer, path: Path, digests: Mapping[str, str]) -> LogState:
    """Put a run where a checkpoint left it; returns what its log had counted.

    InputError when the checkpoint is of other settings, of another teacher or other data, or damaged.
    """
    from safetensors.torch import load_file

    record = read_record(path, _VaeRecord)
    check_files(path, record)
    now = json.loads(json.dumps(trainer.config.to_json() | dict(digests)))
    then = record["settings"] | record["digests"]
    if changed := [name for name in now if name not in _FREE and now[name] != then.get(name)]:
        raise InputError(
            f"checkpoint {str(path)!r} is of a run with another {', another '.join(changed)}: give the same again, or "
            "start over with --overwrite"
        )
    if trainer.config.run.steps < record["step"]:
        raise InputError(
            f"checkpoint {str(path)!r} is at step {record['step']}, beyond --steps {trainer.config.run.steps}: ask for "
            "more"
        )
    trainer.vae.load_state_dict(load_file(path / _WEIGHTS))
    trainer.optimizer.load_state_dict(join_state(load_file(path / _OPTIMIZER), record["optimizer"]))
    states: Any = trainer.optimizer.state
    lay_out_state(states)
    trainer.start(record["step"])
    log: LogState = record["log"]
    return log
