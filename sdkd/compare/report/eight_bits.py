"""Engines in eight bits in a report: how far each one's prediction is from the float one, timestep by timestep."""

from __future__ import annotations

from sdkd.bundle.quantized import Quantized
from sdkd.compare.measure.results import Report
from sdkd.compare.report.columns import EMPTY, Cell
from sdkd.core.console import markdown_table
from sdkd.quantization.words import decision_words, percent

TITLE = "Engines in eight bits, as they were built"
EXPLAINED = (
    "The UNet's prediction against the float one of the same input, relative: the norm of the difference over the "
    "norm. A small error early in an image moves what is drawn, one late its details"
)


def found(report: Report) -> dict[str, Quantized]:
    """By label, what the builds of the engines in eight bits recorded."""
    return {row.subject.label: row.rounding for row in report.results if row.rounding is not None}


def heads(report: Report) -> list[tuple[str, str]]:
    """Title and unit of each column: the timestep, then the subjects."""
    how = {True: "rounded in PyTorch", False: ""}
    return [("Timestep", ""), *((label, how[one.quality.engine is None]) for label, one in found(report).items())]


def rows(report: Report) -> list[tuple[str, list[Cell]]]:
    """Each timestep and one cell for each subject; bad news above the limit that its build accepts."""
    errors = [({row.timestep: row.relative for row in one.quality.errors}, one.quality.limit)
              for one in found(report).values()]  # fmt: skip
    steps = sorted({timestep for each, _ in errors for timestep in each}, reverse=True)
    return [(f"{step:g}", [_cell(each.get(step), limit) for each, limit in errors]) for step in steps]


def _cell(error: float | None, limit: float | None) -> Cell:
    if error is None:
        return EMPTY
    return Cell(percent(error), "", error, "bad" if limit is not None and error > limit else "")


def remarks(report: Report) -> list[str]:
    """A sentence for each engine: its verdict, then scheme, errors, images and speed of when it was built."""
    verdicts = {row.subject.label: row.verdict.found for row in report.results if row.verdict}
    built = {label: "; ".join(decision_words(one, reasons=False)) for label, one in found(report).items()}
    return [f"{label}: {verdicts.get(label, 'not judged')}. As it was built: {words}" for label, words in built.items()]


def lines(report: Report) -> list[str]:
    """A section of report.md."""
    columns = [f"{name}, {unit}" if unit else name for name, unit in heads(report)]
    table = markdown_table(columns, [[step, *(cell.inline for cell in cells)] for step, cells in rows(report)])
    return [f"## {TITLE}", "", *table, "", f"- {EXPLAINED}.", *(f"- {text}." for text in remarks(report))]
