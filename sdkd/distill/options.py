"""Options of the training commands: those that every run has, settings of its config as options, a command of them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

Options = Mapping[str, tuple[Any, Any]]
"""Options by the name of their parameter: annotation and default."""

REQUIRED = inspect.Parameter.empty
TEXTS = ("prompts", "trackers")  # settings that are tuples and are given as one text
INPUTS: Options = {
    "data": (
        Annotated[str, typer.Option(help="Folder, tar shards, parquet, hub id, latents of `sdkd cache`, or demo.")],
        REQUIRED,
    ),
    "output": (Annotated[Path, typer.Option("--output", help="Folder for the run and its result.")], REQUIRED),
}
RUN: Options = {
    "resume": (Annotated[str, typer.Option(help="auto, never, or OUTPUT/checkpoint-<step>.")], "never"),
    "image_column": (Annotated[str | None, typer.Option(help="Column of the images. [default: found]")], None),
    "caption_columns": (Annotated[str | None, typer.Option(help="Columns of captions: 'text,caption'.")], None),
    "overwrite": (Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")], False),
    "json": (Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")], False),
}


def setting_option(
    item: dataclasses.Field[Any], hint: Any, default: Any = None, text: str | None = None
) -> tuple[Any, None]:
    """One setting as an option; None: the config decides. `default` and `text` stand for the setting's own."""
    text, usual = text or item.metadata["help"], item.default if default is None else default
    if "[default" not in text and usual not in ((), None):
        shown = " ".join(str(part) for part in usual) if isinstance(usual, tuple) else usual
        text = f"{text} [default: {str(shown).lower() if isinstance(shown, bool) else shown}]"
    kind = str if item.name in TEXTS else hint
    option = typer.Option(help=text, show_default=False, rich_help_panel=item.metadata["panel"])
    return Annotated[kind | None, option], None


def as_command(name: str, text: str, options: Options, main: Callable[[dict[str, Any]], None]) -> Callable[..., None]:
    """A typer command that calls `main` with the values of its options by name."""

    def call(**values: Any) -> None:
        main(values)

    made: Any = call  # typer reads the signature that is set below
    ordered = sorted(options.items(), key=lambda option: option[1][1] is not REQUIRED)
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(option, kind, default=d, annotation=a) for option, (a, d) in ordered]
    made.__signature__ = inspect.Signature(parameters)
    made.__annotations__ = {option: annotation for option, (annotation, _) in ordered}
    made.__name__, made.__doc__ = name, text
    return call
