"""The comparison as one self-contained HTML page: template, style and script are package data, images are data URIs."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

from sdkd.compare.measure.results import Report
from sdkd.compare.report.against_tables import HEADS, cells, remarks, title
from sdkd.compare.report.bars import latency_bars, latency_ridges, memory_bars, model_colours
from sdkd.compare.report.cells import EMPTY, number
from sdkd.compare.report.charts import plots, scatter
from sdkd.compare.report.gallery import GAINS, PIXELATED_PX, differences, gallery, kinds, worst_images
from sdkd.compare.report.tables import COLUMNS, GIGA, best_rows, full_title, shown_columns
from sdkd.compare.report.words import asked, findings, machine_line, method, models, noise_note

# What the gallery can show: value, name, and a short name for a narrow screen.
SHOWS = (
    ("image", "Image", "Image"),
    ("reference", "Reference", "Reference"),
    *((gain, f"Difference × {gain}", f"Difference × {gain}" if gain == GAINS[0] else f"× {gain}") for gain in GAINS),
)
WIDE, NARROW = (540, 340), (350, 330)
_NAMES = {
    "cpu": "CPU",
    "cpu_features": "CPU features",
    "cpu_mhz": "Clock, MHz",
    "cpu_mhz_after": "Clock after, MHz",
    "cores_usable": "Cores usable",
    "cores_physical": "Cores, physical",
    "threads_torch": "Threads, PyTorch",
    "threads_environment": "Thread settings",
    "load_average": "Load before (1, 5, 15 min)",
    "load_average_after": "Load after",
    "cpu_busy_percent": "CPU busy before, %",
    "gpu_state": "GPU before",
    "gpu_state_after": "GPU after",
    "memory_total_gb": "Memory, GB",
    "gpu": "GPU",
    "gpu_driver": "GPU driver",
    "cuda": "CUDA",
    "os": "System",
    "python": "Python",
    "date_utc": "Began (UTC)",
}


def html_page(report: Report) -> str:
    """The whole page; nothing in it refers to anything outside it."""
    from jinja2 import Environment, StrictUndefined

    files = resources.files(__package__)
    engine = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = engine.from_string((files / "page.html").read_text(encoding="utf-8"))
    return template.render(
        style=(files / "page.css").read_text(encoding="utf-8"),
        script=(files / "page.js").read_text(encoding="utf-8"),
        **_context(report),
    )


def _context(report: Report) -> dict[str, Any]:
    drawn = [{"title": plot.title, "wide": scatter(plot, *WIDE), "narrow": scatter(plot, *NARROW)}
             for plot in plots(report)]  # fmt: skip
    return {
        "report": report,
        "models": models(report),
        "asked": asked(report).replace(" × ", "\u00a0×\u00a0").replace(" px", "\u00a0px"),
        "machine": machine_line(report),
        "notes": [note for note in (noise_note(report), *report.notes) if note],
        "findings": findings(report),
        "latency": latency_bars(report),
        "ridges": latency_ridges(report),
        "memory": memory_bars(report),
        "memory_help": next(column.help for column in COLUMNS if column.key == "memory"),
        "title": full_title,
        "plots": drawn,
        "columns": shown_columns(report, page=True),
        "rows": _rows(report),
        "against": _against(report),
        "gallery": gallery(report),
        "differences": differences(report),
        "worst": worst_images(report),
        "kinds": kinds(report),
        "first_kind": next(iter(kinds(report)), "eager"),
        "shows": SHOWS,
        "againsts": [(kind, name, name) for kind, name in kinds(report).items()],
        "pixelated": max(report.setup.size) <= PIXELATED_PX,
        "environment": _environment(report.environment),
        "versions": report.environment["versions"],
        "attention": _attention(report),
        "ceilings": _ceilings(report),
        "method": method(report),
        "rules": list(dict.fromkeys(row.verdict.rule for row in report.results if row.verdict)),
    }


def _rows(report: Report) -> list[dict[str, Any]]:
    columns, colours = shown_columns(report, page=True), model_colours(report)
    best = {column.key: best_rows(column, report.results) for column in columns}
    return [
        {
            "subject": row.subject,
            "colour": colours[row.subject.model_key],
            "unrepeatable": not row.repeatable,
            "cells": [
                (column, column.cell(row), row.subject.label in best[column.key], column.cell(row) == EMPTY)
                for column in columns
            ],
        }
        for row in report.results
    ]


def _against(report: Report) -> dict[str, Any] | None:
    """The comparison with an earlier report; None without one."""
    if report.against is None:
        return None
    rows = [(change.label, cells(change)) for change in report.against.changes]
    problem = report.against.problem()
    return {
        "title": title(report.against),
        "heads": HEADS,
        "rows": rows,
        "remarks": remarks(report.against),
        "problem": "" if problem is None else str(problem),
    }


def _environment(here: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values for people, in a fixed order; what is not there is left out."""
    shown = {**here, "date_utc": here["date_utc"].removesuffix("+00:00").replace("T", " ")}
    return [(name, text) for key, name in _NAMES.items() if (text := _text(shown.get(key)))]


def _attention(report: Report) -> dict[str, str]:
    """The attention kernel of eager PyTorch: one entry where all subjects agree, one per subject otherwise."""
    found = {f"Attention, {row.subject.label}": row.attention for row in report.results if row.attention}
    kernels = set(found.values())
    return {"Attention, eager PyTorch": kernels.pop()} if len(kernels) == 1 else found


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {item}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _ceilings(report: Report) -> list[tuple[str, str]]:
    """What the machine was seen to do, by precision: rates and how they were measured."""
    return [
        (
            f"Ceilings, {precision}",
            f"{number(found.flops_per_s / GIGA)} GFLOP/s, {number(found.bytes_per_s / GIGA)} GB/s ({found.how})",
        )
        for precision, found in report.ceilings.items()
    ]
