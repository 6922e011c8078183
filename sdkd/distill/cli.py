"""`sdkd distill`, `sdkd finetune` and `sdkd lora`: one trainer; the options are the settings of its config."""

from __future__ import annotations

import dataclasses
import shlex
import typing
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import typer

from sdkd.core.console import progress, show, show_json, table
from sdkd.core.interrupts import is_main
from sdkd.core.numbers import check_number
from sdkd.core.text_files import prompts_of
from sdkd.distill.data.rows import split_columns
from sdkd.distill.options import INPUTS, REQUIRED, RUN, TEXTS, Options, as_command, setting_option
from sdkd.distill.training.config import (
    OBJECTIVES,
    TrainConfig,
    make_config,
    objective_of,
    read_recipe,
    recipe_names,
    settings_of,
)
from sdkd.distill.training.run import Job, run
from sdkd.errors import InputError

_OBJECTIVES = {
    "distill": "distill: output and feature KD; consistency: to few steps. [default: the recipe's, or distill]",
    "lora": "lora: on captioned images; consistency: to few steps. [default: the recipe's, or lora]",
}
_LORA_TEACHER = "With --objective consistency: a teacher with more blocks. [default: the model itself]"
_INIT = {
    "distill": "A student or a checkpoint to start from. [default: the teacher's own layers]",
    "finetune": "A checkpoint to start from. [default: the model's own weights]",
    "lora": "A LoRA or a checkpoint to start from. [default: no change]",
}


def _shared(command: str) -> Options:
    """Options that are not settings."""
    flag = "--teacher" if command == "distill" else "--model"
    names = ", ".join(recipe_names())
    own: dict[str, tuple[Any, Any]] = {}
    if command in _OBJECTIVES:
        own["objective"] = (Annotated[str | None, typer.Option(help=_OBJECTIVES[command])], None)
    if command == "lora":
        own["teacher"] = (Annotated[str | None, typer.Option(help=_LORA_TEACHER)], None)
    own["init"] = (Annotated[str | None, typer.Option("--init", help=_INIT[command])], None)
    own["model"] = (
        Annotated[str, typer.Option(flag, help="A diffusers folder, hub id, .safetensors or demo.")],
        REQUIRED,
    )
    recipe = (Annotated[str | None, typer.Option(help=f"Settings to start from: {names}.")], None)
    processes = (Annotated[int, typer.Option(help="Data-parallel processes (one per GPU).")], 1)
    return own | dict(INPUTS) | {"recipe": recipe} | dict(RUN) | {"num_processes": processes}


def _settings(command: str) -> list[dataclasses.Field[Any]]:
    """The settings of all objectives of a command, in order."""
    names = [name for name, kind in OBJECTIVES.items() if kind.command == command]
    found = {item.name: item for name in names for item in settings_of(name) if item.name != "objective"}
    return [item for item in dataclasses.fields(TrainConfig) if item.name in found]


def _command(command: str, text: str) -> Callable[..., None]:
    """A typer command whose options are the settings of its objectives."""
    hints = typing.get_type_hints(TrainConfig)
    settings = {item.name: setting_option(item, hints[item.name]) for item in _settings(command)}
    return as_command(command, text, {**_shared(command), **settings}, partial(_main, command))


def _main(command: str, values: dict[str, Any]) -> None:
    processes, recipe, as_json = (values.pop(name) for name in ("num_processes", "recipe", "json"))
    check_number("num_processes", processes, 1, 4096, whole=True)
    if processes > 1:
        from sdkd.core.torchrun import relaunch

        relaunch(processes)
        return
    own = {item.name: values.pop(item.name, None) for item in _settings(command)}
    objective, settings = _objective(command, values.pop("objective", None), recipe)
    for name in TEXTS:
        if own[name] is not None:
            own[name] = prompts_of(own[name].replace(",", ";") if name == "trackers" else own[name])
    config = make_config(objective, settings, own)
    job = Job(config=config, **values | {"caption_columns": split_columns(values["caption_columns"] or "")})
    if not is_main():
        run(job)
        return
    with progress(command) as report:
        summary = run(job, report)
    if as_json:
        show_json(summary)
    else:
        _tell(summary)


def _objective(command: str, name: str | None, recipe: str | None) -> tuple[str, dict[str, Any]]:
    """The objective asked for or the recipe's, and its settings; InputError when they differ."""
    if recipe is None:
        return objective_of(command, name), {}
    found, settings = read_recipe(recipe, command)
    if name is not None and objective_of(command, name) != found:
        raise InputError(f"recipe {recipe!r} is not of --objective {name}: leave one of them out")
    return found, settings


def _tell(summary: dict[str, Any]) -> None:
    first, last = summary["first"], summary["last"]
    if first:
        rows = [[name, f"{first[name]:.4g}", f"{last[name]:.4g}"] for name in first if name.startswith("loss/")]
        title = f"Losses of {summary.get('student') or summary['model']}"
        show(table(title, ["", f"to step {first['step']}", f"to step {last['step']}"], rows))
    for note in summary["notes"]:
        show(f"{summary['teacher' if 'student' in summary else 'model']}: {note}.")
    for remark in summary["remarks"]:
        show(f"{remark[0].upper()}{remark[1:]}.")
    if unreadable := summary["unreadable"]:
        show(f"{len(unreadable)} images could not be read and were replaced: {'; '.join(unreadable)}")
    command = shlex.join(["sdkd", "generate", str(summary["output"]), "a prompt"])
    is_lora = OBJECTIVES[summary["objective"]].lora
    show(
        f"{summary['steps']} steps in {summary['seconds']:.0f} s. Saved {summary['output']}."
        + ("" if is_lora else f" Try it: {command}")
    )


distill = _command(
    "distill",
    """Train a student from its teacher: task loss, output KD and feature KD, or consistency: few steps.

    OUTPUT fills while the run goes on (training.jsonl, samples/, checkpoint-N/) and in the end is a whole pipeline
    folder with the student's UNet and a model card. A run that fails before its first checkpoint leaves nothing behind.
    """,
)
finetune = _command(
    "finetune",
    """Train a model on captioned images, without a teacher: the teacher itself or a student.

    OUTPUT fills while the run goes on and in the end is a whole pipeline folder. A run that fails before its first
    checkpoint leaves nothing behind.
    """,
)
lora = _command(
    "lora",
    """Train a LoRA of a model, the teacher or a student, on images or (consistency) to draw in few steps.

    OUTPUT in the end holds pytorch_lora_weights.safetensors, which pipe.load_lora_weights(OUTPUT) reads, and a card.
    """,
)
