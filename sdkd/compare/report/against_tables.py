"""A comparison with an earlier report as a table: rows of cells for terminal, Markdown and page."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from sdkd.compare.measure.against import Against, Change
from sdkd.compare.report.cells import EMPTY, STYLES, Cell, Tone, number
from sdkd.core.console import markdown_table

if TYPE_CHECKING:
    from rich.console import ConsoleRenderable

HEADS = (("Then", "ms"), ("Now", "ms"), ("Speed", "then ÷ now"), ("Verdict", ""), ("Images", "to own eager"))
_TONES: dict[str, Tone] = {
    "faster": "good", "slower": "bad", "tie": "muted", "not compared": "muted",
    "better": "good", "worse": "bad", "changed": "", "same": "muted",
}  # fmt: skip
_PLURALS = {"faster": "faster", "slower": "slower", "tie": "ties", "not compared": "not compared"}


def title(against: Against) -> str:
    """What the report is held against, and how it came out: `Against old.json of 2026-01-02: 1 slower, 2 ties`."""
    found = Counter(change.verdict for change in against.changes)
    counts = [f"{count} {_PLURALS[name] if count > 1 else name}" for name, count in found.items()]
    return f"Against {against.report} of {against.day}: {', '.join(counts)}"


def cells(change: Change) -> tuple[Cell, ...]:
    """One cell for each of HEADS."""
    then, now, ratio = change.then.step_ms, change.now.step_ms, change.speed
    speed = EMPTY if ratio is None else Cell(f"{ratio.value:.2f}×", f"{ratio.low:.2f}–{ratio.high:.2f}")
    verdict = Cell(change.verdict, tone=_TONES[change.verdict])
    return Cell(number(then.median)), Cell(number(now.median)), speed, verdict, _images(change)


def _images(change: Change) -> Cell:
    if change.images == "not compared":
        return EMPTY
    moved = change.psnr_change_db
    note = "" if moved is None or change.images == "same" else f"{moved:+.1f} dB"
    return Cell(change.images, note, tone=_TONES[change.images])


def remarks(against: Against) -> list[str]:
    """In words: settings that differ, who came and went, what else changed."""
    found = [f"Not the same as then: {'; '.join(against.differences)}"] if against.differences else []
    reasons = {change.why_not: change.label for change in against.changes if change.why_not}
    found += [f"{label}: {why}" for why, label in reasons.items() if why.startswith(("another", "fewer"))]
    for names, words in ((against.appeared, "Appeared since"), (against.went, "Gone since")):
        found += [f"{words}: {', '.join(names)}"] if names else []
    return found + ([f"Changed since: {'; '.join(against.notes)}"] if against.notes else [])


def markdown_lines(against: Against) -> list[str]:
    """A section of report.md."""
    heads = ["Subject", *(f"{name}, {unit}" if unit else name for name, unit in HEADS)]
    rows = [[change.label, *(cell.inline for cell in cells(change))] for change in against.changes]
    return [f"## {title(against)}", "", *markdown_table(heads, rows), "", *(f"- {text}." for text in remarks(against))]


def against_table(against: Against) -> ConsoleRenderable:
    """For a terminal of 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("\nsubject", overflow="fold")
    for name, unit in HEADS:
        table.add_column(f"{name.lower()}\n{unit}", justify="right", no_wrap=True)
    for change in against.changes:
        row = cells(change)
        texts = [Text.assemble((c.text, STYLES[c.tone]), (f" ({c.note})" if c.note else "", "dim")) for c in row]
        table.add_row(change.label, *texts)
    return Group(Text(title(against), style="bold"), table, *(Text(remark) for remark in remarks(against)))
