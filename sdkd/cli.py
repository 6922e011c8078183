"""The `sdkd` command: finds each package's commands, loads one on use, and turns errors into one clear message."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from sdkd import __version__
from sdkd.core.child import environment
from sdkd.core.console import prepare_streams, printable
from sdkd.core.help_page import Command, rows_of, show_page
from sdkd.core.interrupts import ended, hear_signals, heard
from sdkd.errors import in_words

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "sdkd.commands"
# One line per command, so that `sdkd --help` needs to import none of them.
SUMMARIES = {
    "demo": "The whole way on this machine, with the embedded teacher.",
    "student": "Build a student from a teacher, without training.",
    "cache": "Encode images and captions once, for many runs.",
    "distill": "Train a student from its teacher.",
    "finetune": "Train a model on captioned images, without a teacher.",
    "lora": "Train a LoRA of a teacher or a student.",
    "vae-distill": "Train a small VAE from a model's own.",
    "remap-lora": "Make a LoRA of SD 1.x, 2.x or SDXL fit a student.",
    "plot": "Draw a run's losses and validation images as one page.",
    "evaluate": "Quality, and agreement with the teacher.",
    "convert": "Write a model as one file that other programs open.",
    "export": "Export a pipeline to ONNX, checked against PyTorch.",
    "build-engine": "Build engines for a target.",
    "inspect": "Say what is in a bundle, what is stale and why.",
    "generate": "Make images from a prompt, with any target.",
    "compare": "Compare models and targets: speed, size and likeness.",
    "serve": "Images over HTTP: a page, OpenAI's and A1111's APIs.",
    "doctor": "Say what this machine can build and run, and what to install.",
}
# Libraries that talk over our own progress and tables; a user's own setting wins.
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

MAY_BE_EMPTY = ("prompt", "negative_prompt")

_debug = False


def _entry_points() -> dict[str, EntryPoint]:
    found = {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}
    order = [*SUMMARIES, *sorted(set(found) - set(SUMMARIES))]
    return {name: found[name] for name in order if name in found}


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The command's function, leaving with one message: status 1 when refused or failed, 130 when interrupted, 143
    when ended by SIGTERM.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except KeyboardInterrupt as error:
            leave(*ended(str(error)))
        except BrokenPipeError:
            raise  # who reads our output has left: no message can reach them
        except Exception as error:
            if heard() and not _debug:  # a KeyboardInterrupt that a library took for a fault of the file that it read
                leave(*ended(""))
            message = in_words(error)
            if _debug or message is None:
                raise
            leave(message, 1)

    return call


def leave(message: str, status: int) -> NoReturn:
    """Print to standard error and exit."""
    sys.stderr.write(f"sdkd: {printable(message)}\n")
    sys.exit(status)


def load_command(name: str) -> Any:
    """The command of an entry point, imported now; None when there is none of that name."""
    entry = _entry_points().get(name)
    return None if entry is None else _command(name, guarded(guarded(entry.load)()))


def _command(name: str, function: Callable[..., Any]) -> Any:
    one = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    one.command(name, cls=Strict, help=inspect.getdoc(function) or SUMMARIES.get(name))(function)
    return typer.main.get_command(one)


class Strict(Command):
    """A command that takes an option twice only where that makes a list, since one of two values would be lost, and an
    empty text for a prompt alone, since elsewhere it would mean the default.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words of the command line; typer.BadParameter (status 2) for what is given again or empty."""
        values, _, order = self.make_parser(ctx).parse_args(list(args))
        given = Counter(param.name for param in order)
        param: Any
        for param in self.get_params(ctx):
            found = values.get(param.name)
            texts = found if isinstance(found, list | tuple) else (found,)
            if param.name not in MAY_BE_EMPTY and any(isinstance(text, str) and not text.strip() for text in texts):
                raise typer.BadParameter("it is empty: give a value, or leave it out", ctx=ctx, param=param)
            single = not param.multiple and (not getattr(param, "is_flag", False) or param.secondary_opts)
            if single and param.param_type_name == "option" and given[param.name] > 1:
                names = " / ".join((*param.opts, *param.secondary_opts))
                ctx.fail(f"Option '{names}' is given {given[param.name]} times: give it once.")
        return list(super().parse_args(ctx, args))


class Commands(TyperGroup):
    """A group whose commands come from the entry points and are imported when one is used."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of the way through the toolkit."""
        return list(_entry_points())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import one command."""
        return load_command(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The help page; commands are their summaries, so that none is imported."""
        commands = [("", name, SUMMARIES.get(name, "")) for name in self.list_commands(ctx)]
        show_page(self, ctx, [("Options", rows_of(ctx, self.get_params(ctx))), ("Commands", commands)])


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"sdkd {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Make Stable Diffusion 1.x, 2.x and SDXL small and fast: students, ONNX, engines, comparison."""
    global _debug
    _debug = debug


def main() -> None:
    """Console script: status 0 only when the work is done, 2 for bad usage, 1 with one clear message otherwise."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    prepare_streams()
    os.environ.update(environment())  # of what libraries start, too
    hear_signals()
    app(prog_name="sdkd")


if __name__ == "__main__":
    main()
