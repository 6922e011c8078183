"""The folder of a training run: where it fills, what it may replace, and what becomes of it in the end.

A run fills its output, with a record of sdkd's from the start. One that is to replace what is there fills a hidden
folder beside it, `.NAME.new`, and takes its place when it is complete; until then `--resume auto` looks there, too.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from sdkd.core.files import check_free, lock, write_json
from sdkd.core.interrupts import is_main
from sdkd.core.marks import RUN, foreign, proves
from sdkd.core.outputs import Input, check_place, why_kept
from sdkd.core.replace import discard, sweep_inside
from sdkd.distill.training.record import checkpoints
from sdkd.errors import InputError, InterruptedRunError, OutputExistsError
from sdkd.models.checkpoint import RECORD
from sdkd.models.diffusers_folder import PROVENANCE

AUTO = "auto"


class Settings(Protocol):
    """What a run's folder says of it from the start."""

    @property
    def objective(self) -> str:
        """What is trained."""

    def to_json(self) -> dict[str, Any]:
        """All that it was asked for."""


def spare_folder(output: Path) -> Path:
    """Where a run fills that is to replace what is in the output."""
    place = Path(os.path.realpath(output))
    return place.with_name(f".{place.name}.new")


def newest(output: Path) -> Path | None:
    """The checkpoint that `--resume auto` goes on from: of a run that is to replace the output, else the output's."""
    found = checkpoints(spare_folder(output)) or checkpoints(output)
    return found[-1] if found else None


def find_checkpoint(output: Path, resume: str) -> Path | None:
    """The checkpoint to go on from, or None to start at step 0; InputError when the one asked for is not there."""
    if resume == "never":
        return None
    if resume == AUTO:
        return newest(output)
    path = Path(resume)
    if not (path / RECORD).is_file():
        raise InputError(f"resume {resume!r} is no checkpoint: give auto, never, or OUTPUT/checkpoint-<step>")
    if path.resolve().parent not in (output.resolve(), spare_folder(output)):
        raise InputError(
            f"checkpoint {resume!r} is not of the output {str(output)!r}: give --output {shlex.quote(str(path.parent))}"
        )
    return path


def check_output(
    output: Path, resume: str, overwrite: bool, inputs: Iterable[Input] = (), *, goes_on: bool = False
) -> None:
    """What the guard of outputs says of a run's folder, and what to do about an unfinished run."""
    if goes_on:
        check_place(output, inputs)
        return
    if overwrite and _occupied(output, resume):
        check_free(spare_folder(output), True, inputs)
    if not overwrite and checkpoints(output):
        raise OutputExistsError(
            f"output {str(output)!r} holds checkpoints of a run: go on with --resume auto, or pass --overwrite"
        )
    check_free(output, overwrite or not _occupied(output, resume), inputs)


def _occupied(output: Path, resume: str) -> bool:
    """Whether the output holds anything, an unfinished run that starts over apart."""
    if not output.is_dir() or not any(output.iterdir()):
        return False
    return not (resume == AUTO and is_unfinished(output))


def is_whole(folder: Path) -> bool:
    """Whether a folder holds the result of a finished run."""
    names = ("model_index.json", "pytorch_lora_weights.safetensors", "diffusion_pytorch_model.safetensors")
    return any((folder / name).is_file() for name in names)


def is_unfinished(folder: Path) -> bool:
    """Whether a folder holds a run that was killed before its first checkpoint, and nothing else."""
    return not (is_whole(folder) or checkpoints(folder)) and proves(folder, RUN) and foreign(folder, RUN) is None


@contextlib.contextmanager
def run_folder(output: Path, checkpoint: Path | None, resume: str, overwrite: bool, config: Settings) -> Iterator[Path]:
    """The folder that fills, after `check_output`. The first of several processes holds its lock.

    A run that fails without a checkpoint leaves the output as it was; InterruptedRunError when Ctrl-C came after one.
    """
    spare = spare_folder(output)
    aside = checkpoint.resolve().parent == spare if checkpoint else overwrite and _occupied(output, resume)
    folder = spare if aside else output
    if not is_main():
        yield folder
        return
    with lock(output):
        existed = folder.exists()
        if checkpoint is None:
            _drop(spare)
            _start_anew(folder, config)
        try:
            yield folder
        except BaseException as error:
            sweep_inside(folder)
            kept = checkpoints(folder)
            if checkpoint is None and not kept:
                for path in folder.iterdir() if existed and not aside else (folder,):
                    discard(path)
            if isinstance(error, KeyboardInterrupt) and kept:
                raise InterruptedRunError(
                    f"interrupted: {kept[-1]} is kept, go on from it by the same command with --resume auto"
                ) from None
            raise
        _drop(spare)


def _drop(spare: Path) -> None:
    """Remove what an earlier run has left that was to replace the output; nothing else of that name."""
    if spare.is_dir() and (not any(spare.iterdir()) or why_kept(spare) is None):
        discard(spare)


def _start_anew(folder: Path, config: Settings) -> None:
    """An empty folder, and in it what says that sdkd fills it."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        discard(path)
    about = {"objective": config.objective, "unfinished": True, "settings": config.to_json()}
    write_json(folder / PROVENANCE, about)


def carry_over(folder: Path, result: Path) -> None:
    """Log, samples, checkpoints and whatever else is in a run's folder, into its result, where that lacks it.

    By links, which cost nothing.
    """
    sweep_inside(folder)
    for path in sorted(folder.iterdir()):
        target = result / path.name
        if target.exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, target, symlinks=True, copy_function=_link)
        else:
            _link(str(path), str(target))


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without links
        shutil.copy2(source, target, follow_symlinks=False)
    return target
