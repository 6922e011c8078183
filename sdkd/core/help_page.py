"""The help page of a command: its options in named panels, the usual ones first, every name whole at any width."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

if TYPE_CHECKING:
    from rich.panel import Panel

ARGUMENTS = "Arguments"
USUAL = "Usual options"
LOSSES = "Losses"
CONSISTENCY = "Few steps"
ROUNDING = "Eight bits"
OPTIMIZER = "Optimizer"
LORA = "LoRA"
DATA = "Data"
IMAGES = "Images to start from"
SAMPLES = "Validation images"
METRICS = "Metrics"
PARTS = "Parts"
SHAPES = "Shapes"
ENGINES = "Engines"
TENSORRT = "TensorRT"
TRUST = "Who may ask"
LIMITS = "Limits of a request"
MEASURING = "Measuring"
EARLIER = "Against an earlier report"
STATES = "Checkpoints and log"
SPEED = "Speed and memory"
OUTPUT = "Output and help"
PANELS = (
    *(ARGUMENTS, USUAL, LOSSES, CONSISTENCY, ROUNDING, OPTIMIZER, LORA, DATA, IMAGES, SAMPLES, METRICS, PARTS, SHAPES),
    *(ENGINES, TENSORRT, TRUST, LIMITS, MEASURING, EARLIER, STATES, SPEED, OUTPUT),
)
"""Titles in the order of a page; each command has some of them."""

# Which parameters stand where; all others are among the usual ones. The settings of the training commands say their
# panel themselves (sdkd/distill/training/config.py).
_EVERYWHERE = {OUTPUT: "overwrite json force help", DATA: "image_column caption_columns", SPEED: "device num_processes"}
_OWN: dict[str, dict[str, str]] = {
    "cache": {DATA: "text", SPEED: "workers shard_images"},
    "evaluate": {METRICS: "real clip inception"},
    "export": {
        PARTS: "vae controlnet lora hidden_states step_caching t2i_adapter timesteps ip_adapter keep_float",
        SHAPES: "static size batch tokens opset",
    },
    "build-engine": {
        PARTS: "vae lora step_caching",
        SHAPES: "size_opt batch_opt tokens profile",
        TENSORRT: "optimization_level workspace_gb refit hardware_compatible compute_capability",
        SPEED: "memory_cap_gb",
    },
    "generate": {
        IMAGES: "image mask control strength control_scale image_guidance_scale",
        SPEED: "batch cache_interval low_memory",
        PARTS: "vae",
    },
    "student": {PARTS: "vae"},
    "convert": {PARTS: "vae lora"},
    "compare": {
        PARTS: "vae cache_interval",
        ENGINES: "precision bundles",
        MEASURING: "batch seed runs baseline in_process",
        EARLIER: "against threshold report",
    },
    "serve": {
        TRUST: "api_key no_auth allow_host allow_origin",
        LIMITS: "max_steps max_images max_pixels max_queue max_body_mb",
        SPEED: "memory_gb drain_seconds",
    },
}
_LEAST = 36  # characters that a help text gets, however narrow the terminal says it is


class Command(TyperCommand):
    """A command whose help page is ours."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the page."""
        show_page(self, ctx, [(title, rows_of(ctx, found)) for title, found in panels(self, ctx).items()])


def panels(command: Any, ctx: Any) -> dict[str, list[Any]]:
    """Title -> parameters that are shown, in the order of the page."""
    found: dict[str, list[Any]] = {title: [] for title in PANELS}
    for param in command.get_params(ctx):
        if not param.hidden:
            found[_title(command.name, param)].append(param)
    return {title: params for title, params in found.items() if params}


def _title(command: str, param: Any) -> str:
    if param.param_type_name == "argument":
        return ARGUMENTS
    if param.rich_help_panel:
        return str(param.rich_help_panel)
    for table in (_OWN.get(command, {}), _EVERYWHERE):
        for title, names in table.items():
            if param.name in names.split():
                return title
    return USUAL


def rows_of(ctx: Any, params: Iterable[Any]) -> list[tuple[str, str, str]]:
    """(`*` when required, names with one line for a flag's opposite, type and help with default) of each parameter."""
    return [("*" if param.required else "", *_names_and_help(ctx, param)) for param in params]


def _names_and_help(ctx: Any, param: Any) -> tuple[str, str]:
    declared, text = param.get_help_record(ctx)
    if param.param_type_name == "argument":
        names, _, kind = declared.partition(" ")
    else:
        both = [", ".join(sorted(some, key=len)) for some in (param.opts, param.secondary_opts) if some]
        names, kind = "\n".join(both), declared.rpartition(both[-1].split()[-1])[2]
    return names, " ".join([*kind.split(), *text.split()])


def show_page(command: Any, ctx: Any, sections: Sequence[tuple[str, list[tuple[str, str, str]]]]) -> None:
    """Print usage, description and one panel per section of (mark, name, text) rows."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    names = max(len(line) for _, rows in sections for _, name, _ in rows for line in name.split("\n"))
    console = Console(highlight=False)
    console.width = max(console.width, names + _LEAST)
    marked = any(mark for _, rows in sections for mark, _, _ in rows)
    console.print(Padding(Text(command.get_usage(ctx), "bold"), 1))
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        console.print(Padding(Text(" ".join(paragraph.split())), (0, 1, 1, 1)))
    for title, rows in sections:
        console.print(_panel(title, rows, names, marked))


def _panel(title: str, rows: list[tuple[str, str, str]], width: int, marked: bool) -> Panel:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1), expand=True)
    if marked:
        grid.add_column(style="red", width=1)
    grid.add_column(style="bold cyan", no_wrap=True, width=width)
    grid.add_column(overflow="fold", ratio=1)
    for mark, *cells in rows:
        grid.add_row(*map(Text, [mark, *cells] if marked else cells))
    return Panel(grid, title=Text(title), title_align="left", border_style="dim")
