"""`sdkd distill`, `sdkd finetune` and `sdkd lora`: one trainer; the options are the settings of its config."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sdkd.core.console import progress, show, show_json, table
from sdkd.core.interrupts import is_main
from sdkd.core.numbers import check_number
from sdkd.core.text_files import prompts_of
from sdkd.distill.data.rows import split_columns
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

_TEXTS = ("prompts", "trackers")  # tuples that are given as one text
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


def _shared(command: str) -> dict[str, tuple[Any, Any]]:
    """Options that are not settings: name -> (annotation, default)."""
    flag = "--teacher" if command == "distill" else "--model"
    required = inspect.Parameter.empty
    names = ", ".join(recipe_names())
    own: dict[str, tuple[Any, Any]] = {}
    if command in _OBJECTIVES:
        own["objective"] = (Annotated[str | None, typer.Option(help=_OBJECTIVES[command])], None)
    if command == "lora":
        own["teacher"] = (Annotated[str | None, typer.Option(help=_LORA_TEACHER)], None)
    return own | {
        "init": (Annotated[str | None, typer.Option("--init", help=_INIT[command])], None),
        "model": (
            Annotated[str, typer.Option(flag, help="A diffusers folder, hub id, .safetensors or demo.")],
            required,
        ),
        "data": (
            Annotated[str, typer.Option(help="Folder, tar shards, parquet, hub id, latents of `sdkd cache`, or demo.")],
            required,
        ),
        "output": (Annotated[Path, typer.Option("--output", help="Folder for the run and its result.")], required),
        "recipe": (Annotated[str | None, typer.Option(help=f"Settings to start from: {names}.")], None),
        "resume": (Annotated[str, typer.Option(help="auto, never, or OUTPUT/checkpoint-<step>.")], "never"),
        "image_column": (Annotated[str | None, typer.Option(help="Column of the images. [default: found]")], None),
        "caption_columns": (Annotated[str | None, typer.Option(help="Columns of captions: 'text,caption'.")], None),
        "num_processes": (Annotated[int, typer.Option(help="Data-parallel processes (one per GPU).")], 1),
        "overwrite": (Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")], False),
        "json": (Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")], False),
    }


def _setting_option(item: dataclasses.Field[Any], hint: Any) -> tuple[Any, None]:
    """One setting as an option; None means that recipe or default decide."""
    text = item.metadata["help"]
    if "[default" not in text and item.default not in ((), None):
        shown = " ".join(str(part) for part in item.default) if isinstance(item.default, tuple) else item.default
        text = f"{text} [default: {str(shown).lower() if isinstance(shown, bool) else shown}]"
    kind = str if item.name in _TEXTS else hint
    option = typer.Option(help=text, show_default=False, rich_help_panel=item.metadata["panel"])
    return Annotated[kind | None, option], None


def _settings(command: str) -> list[dataclasses.Field[Any]]:
    """The settings of all objectives of a command, in order."""
    names = [name for name, kind in OBJECTIVES.items() if kind.command == command]
    found = {item.name: item for name in names for item in settings_of(name) if item.name != "objective"}
    return [item for item in dataclasses.fields(TrainConfig) if item.name in found]


def _command(command: str, text: str) -> Callable[..., None]:
    """A typer command whose options are the settings of its objectives."""
    hints = typing.get_type_hints(TrainConfig)
    options = _shared(command) | {item.name: _setting_option(item, hints[item.name]) for item in _settings(command)}

    def call(**values: Any) -> None:
        _main(command, values)

    made: Any = call  # typer reads the signature that is set below
    ordered = sorted(options.items(), key=lambda option: option[1][1] is not inspect.Parameter.empty)
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(name, kind, default=d, annotation=a) for name, (a, d) in ordered]
    made.__signature__ = inspect.Signature(parameters)
    made.__annotations__ = {name: annotation for name, (annotation, _) in ordered}
    made.__name__, made.__doc__ = command, text
    return call


def _main(command: str, values: dict[str, Any]) -> None:
    processes, recipe, as_json = (values.pop(name) for name in ("num_processes", "recipe", "json"))
    check_number("num_processes", processes, 1, 4096, whole=True)
    if processes > 1:
        from sdkd.core.torchrun import relaunch

        relaunch(processes)
        return
    own = {item.name: values.pop(item.name, None) for item in _settings(command)}
    objective, settings = _objective(command, values.pop("objective", None), recipe)
    for name in _TEXTS:
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
