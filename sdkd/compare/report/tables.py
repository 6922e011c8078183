"""A comparison as tables: Markdown, and a terminal of 80 columns; and against an earlier report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sdkd.compare.measure.against import Against, Change
from sdkd.compare.measure.results import Report, Result
from sdkd.compare.report import eight_bits, stairs
from sdkd.compare.report.columns import EMPTY, STYLES, Cell, Column, Tone, full_title, number, shown_columns
from sdkd.compare.report.words import machine_line, notes, sentence
from sdkd.core.console import markdown_table, no_html

if TYPE_CHECKING:
    from rich.console import ConsoleRenderable
    from rich.table import Table

# What fits a terminal of 80 columns: four tables, by column a heading of two lines.
_TERMINAL = (
    {
        "step": "step\nms", "eager": "over\neager", "teacher": "over\nteacher", "baseline": "over\nbaseline",
        "images": "images\nper s", "limit": "of\nlimit", "unet": "UNet\nM", "disk": "disk\nMB",
    },
    {
        "steps": "\nsteps", "guidance": "\nguidance", "image-eager": "image over\nown eager",
        "image-teacher": "image over\nteacher",
    },
    {
        "text": "text\nms", "calls": "UNet\ncalls", "vae": "VAE\nms", "rest": "rest\nms", "memory": "peak RAM\n+MB",
        "gpu": "peak GPU\nMB",
    },
    {
        "psnr": "own eager\ndB (worst)", "verdict": "\nverdict", "agreement": "teacher\ndB PSNR", "clip": "CLIP\nscore",
        "judged": "caption\nright",
    },
)  # fmt: skip
_REMARKED = ("step", "image-eager", "image-teacher", "psnr")  # columns whose remark fits, too
HEADS = (("Then", "ms"), ("Now", "ms"), ("Speed", "then ÷ now"), ("Verdict", ""), ("Images", "to own eager"))
_TONES: dict[str, Tone] = {
    "faster": "good", "slower": "bad", "tie": "muted", "not compared": "muted",
    "better": "good", "worse": "bad", "changed": "", "same": "muted",
}  # fmt: skip
_PLURALS = {"faster": "faster", "slower": "slower", "tie": "ties", "not compared": "not compared"}


def markdown(report: Report) -> str:
    """The table for a README, with what was asked and where it was measured."""
    columns, parts = shown_columns(report), shown_columns(report, parts=True)
    lines = [f"# {sentence(report)}", "", f"Measured on {machine_line(report)}.", "", *_markdown_table(report, columns)]
    lines += ["", *_markdown_table(report, parts)] if parts else []
    lines[4:4] = stair_lines(report)
    lines += ["", *eight_bits.lines(report)] if eight_bits.found(report) else []
    failed = [f"- **{one.subject.label} failed**: {one.reason}" for one in report.failed]
    lines += ["", *failed] if failed else []
    lines += ["", *(f"- {column.title}: {column.help}" for column in (*columns, *parts))]
    lines += [f"- Note: {note}." for note in notes(report)]
    lines += [] if report.against is None else ["", *against_lines(report.against)]
    text = no_html("\n".join(lines)) + "\n"
    return text + (f"\nMade again by:\n\n    {report.command}\n" if report.command else "")


def stair_lines(report: Report) -> list[str]:
    """The staircase as a section of report.md; nothing where there is none."""
    if not report.stairs:
        return []
    head = ["", *(f"{name}, {unit}" if unit else name for name, unit, _ in stairs.heads(report))]
    rows = [[str(place), *(cell.inline for cell in stairs.cells(report, stair))]
            for place, stair in enumerate(report.stairs, 1)]  # fmt: skip
    said = [f"- {text}." for text in stairs.remarks(report)]
    return [f"## {stairs.title(report)}", "", *markdown_table(head, rows, left=2), "", *said, "", "## All figures", ""]


def _stair_table(report: Report) -> Table:
    """For a terminal of 80 columns."""
    heads = stairs.heads(report)[1:]
    rows = {stair.change: [replace(cell, note="") for cell in stairs.cells(report, stair)[1:]]
            for stair in report.stairs}  # fmt: skip
    return _table([short for _, _, short in heads], rows)


def _markdown_table(report: Report, columns: Sequence[Column]) -> list[str]:
    head = ["Subject", *(full_title(column) for column in columns)]
    rows = [[row.subject.label, *(column.cell(row).inline for column in columns)] for row in report.results]
    return markdown_table(head, rows)


def terminal_table(report: Report) -> ConsoleRenderable:
    """Tables for a terminal of 80 columns: speed and size, parts and memory, then the images; the page has the rest."""
    from rich.console import Group
    from rich.text import Text

    shown = (*shown_columns(report), *shown_columns(report, parts=True))
    tables: list[ConsoleRenderable] = []
    if report.stairs:
        tables += [Text(stairs.title(report), style="bold"), _stair_table(report)]
    for heads in _TERMINAL:
        if columns := [column for column in shown if column.key in heads]:
            rows = {row.subject.label: [_short(column, row) for column in columns] for row in report.results}
            tables.append(_table([heads[column.key] for column in columns], rows))
    tables += [Text(f"{text}.") for text in eight_bits.remarks(report)]
    failed = [Text(f"✗ {one.subject.label} failed: {one.reason}", "bold red") for one in report.failed]
    return Group(*tables, *failed, *([] if report.against is None else [against_table(report.against)]))


def _short(column: Column, row: Result) -> Cell:
    cell = column.cell(row)
    return replace(cell, note=cell.note.removeprefix("worst ") if column.key in _REMARKED else "")


def _table(heads: Sequence[str], rows: Mapping[str, Sequence[Cell]]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("\nsubject", overflow="fold")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for label, cells in rows.items():
        notes = [f" ({cell.note})" if cell.note else "" for cell in cells]
        styled = [(cell.text, STYLES[cell.tone]) for cell in cells]
        table.add_row(label, *(Text.assemble(text, (note, "dim")) for text, note in zip(styled, notes, strict=True)))
    return table


def against_title(against: Against) -> str:
    """What the report is held against, and how it came out: `Against old.json of 2026-01-02: 1 slower, 2 ties`."""
    found = Counter(change.verdict for change in against.changes)
    counts = [f"{count} {_PLURALS[name] if count > 1 else name}" for name, count in found.items()]
    return f"Against {against.report} of {against.day}: {', '.join(counts)}"


def against_cells(change: Change) -> tuple[Cell, ...]:
    """One cell for each of HEADS."""
    then, now, ratio = change.then.step_ms, change.now.step_ms, change.speed
    speed = EMPTY if ratio is None else Cell(f"{ratio.value:.2f}×", f"{ratio.low:.2f}–{ratio.high:.2f}")
    verdict = Cell(change.verdict, tone=_TONES[change.verdict])
    return Cell(number(then.median)), Cell(number(now.median)), speed, verdict, _images_cell(change)


def _images_cell(change: Change) -> Cell:
    if change.images == "not compared":
        return EMPTY
    moved = change.psnr_change_db
    note = "" if moved is None or change.images == "same" else f"{moved:+.1f} dB"
    return Cell(change.images, note, tone=_TONES[change.images])


def against_remarks(against: Against) -> list[str]:
    """In words: settings that differ, who came and went, what else changed."""
    found = [f"Not the same as then: {'; '.join(against.differences)}"] if against.differences else []
    reasons: dict[str, list[str]] = {}
    for change in against.changes:
        reasons.setdefault(change.why_not, []).append(change.label)
    found += [f"{', '.join(labels)}: {why}" for why, labels in reasons.items() if why.startswith(("another", "fewer"))]
    for names, words in ((against.appeared, "Appeared since"), (against.went, "Gone since")):
        found += [f"{words}: {', '.join(names)}"] if names else []
    return found + ([f"Changed since: {'; '.join(against.notes)}"] if against.notes else [])


def against_lines(against: Against) -> list[str]:
    """A section of report.md."""
    heads = ["Subject", *(f"{name}, {unit}" if unit else name for name, unit in HEADS)]
    rows = [[change.label, *(cell.inline for cell in against_cells(change))] for change in against.changes]
    remarks = (f"- {text}." for text in against_remarks(against))
    return [f"## {against_title(against)}", "", *markdown_table(heads, rows), "", *remarks]


def against_table(against: Against) -> ConsoleRenderable:
    """For a terminal of 80 columns."""
    from rich.console import Group
    from rich.text import Text

    heads = [f"{name.lower()}\n{unit}" for name, unit in HEADS]
    table = _table(heads, {change.label: against_cells(change) for change in against.changes})
    return Group(Text(against_title(against), style="bold"), table, *map(Text, against_remarks(against)))
