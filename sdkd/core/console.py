"""What commands print: tables, JSON and progress with time left. Only `cli` modules use it directly."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
Progress = Callable[[str, float | None], None]
"""Called with what is being done and the fraction done (0 to 1, or None when unknown)."""


def quiet(message: str, fraction: float | None = None) -> None:
    """The Progress that shows nothing."""


def within(progress: Progress, start: float, end: float, prefix: str = "") -> Progress:
    """A Progress for one part of a longer job: its 0..1 becomes start..end of `progress`."""

    def part(message: str, fraction: float | None) -> None:
        progress(prefix + message, start if fraction is None else start + (end - start) * fraction)

    return part


def console(stderr: bool = False) -> Console:
    """A rich console on standard output or standard error."""
    from rich.console import Console

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text), **options)

    return Plain(stderr=stderr, soft_wrap=True, markup=False, emoji=False)


def printable(text: str) -> str:
    """Text that a terminal only shows: control characters (escape sequences begin with one) are spelled out."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def no_html(markdown: str) -> str:
    """Markdown in which names cannot be tags: what `<` begins is read as HTML."""
    return printable(markdown).replace("<", "&lt;")


def styled(text: str, style: str) -> Text:
    """A text in bold, red, ...; what is printed is never read as markup, since names of files may look like it."""
    from rich.text import Text

    return Text(printable(text), style=style)


def prepare_streams() -> None:
    """Output that does not fail: what an encoding lacks is spelled out, and a width of 0 (COLUMNS) is none."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if os.environ.get("COLUMNS", "").strip() == "0":
        del os.environ["COLUMNS"]


def show(*renderables: Any, sep: str = "\n") -> None:
    """Print to standard output."""
    console().print(*renderables, sep=sep)


def show_json(data: object) -> None:
    """Print JSON alone to standard output, for other programs."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A rich table; a column whose name ends in a unit or whose cells are numbers is right-aligned."""
    from rich.table import Table
    from rich.text import Text

    result = Table(title=title, title_justify="left", header_style="bold")
    for index, name in enumerate(columns):
        numeric = bool(rows) and all(_is_number(str(row[index])) for row in rows)
        result.add_column(name, justify="right" if numeric else "left", overflow="fold", no_wrap=index == 0)
    for row in rows:
        result.add_row(*(cell if isinstance(cell, Text) else str(cell) for cell in row))
    return result


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """The lines of a Markdown table; the first `left` columns are left-aligned, the others right-aligned."""
    aligned = ["---"] * left + ["---:"] * (len(heads) - left)
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (heads, aligned, *cells)]


def _is_number(text: str) -> bool:
    return text in {"", "-", "inf"} or text.lstrip("+-").replace(",", "").replace(".", "", 1).rstrip(" x%").isdigit()


@contextlib.contextmanager
def progress(title: str) -> Iterator[Progress]:
    """A live bar with time left on a terminal, plain lines elsewhere; on standard error."""
    target = console(stderr=True)
    with (_bar if target.is_terminal else _lines)(title, target) as report:
        yield report


@contextlib.contextmanager
def _bar(title: str, target: Console) -> Iterator[Progress]:
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.fields[title]}", style="bold", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Bar(*columns, console=target) as bar:
        task = bar.add_task("", total=1.0, title=title)

        def report(message: str, fraction: float | None) -> None:
            bar.update(task, description=printable(message), completed=fraction)

        yield report
        bar.update(task, completed=1.0)


@contextlib.contextmanager
def _lines(title: str, target: Console) -> Iterator[Progress]:
    start, last = time.monotonic(), ["", -1.0]

    def report(message: str, fraction: float | None) -> None:
        # A counter that moves on is the same message: say it again only when a twentieth of the work was done.
        kind = re.sub(r"[\d.,]+", "#", message)
        part = last[1] if fraction is None else int(fraction * 20)
        if [kind, part] == last:
            return
        last[:] = [kind, part]
        target.print(f"{title}: {message}{_time_left(start, fraction)}", highlight=False)

    yield report


def _time_left(start: float, fraction: float | None) -> str:
    if not fraction or fraction >= 1:
        return ""
    spent = time.monotonic() - start
    left = spent * (1 - fraction) / fraction
    return f" ({fraction:.0%}, {left:.0f} s left)" if spent > 2 else f" ({fraction:.0%})"
