"""A report's files: report.json, report.md, images/ and report.html, alone or beside files of others.

The page is self-contained: template, style and script are package data, images are data URIs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from sdkd.compare.measure.results import Report, image_name
from sdkd.compare.report import eight_bits, stairs
from sdkd.compare.report.charts import latency_bars, latency_ridges, memory_bars, model_colours, plots, scatter
from sdkd.compare.report.columns import COLUMNS, EMPTY, GIGA, best_rows, full_title, number, shown_columns
from sdkd.compare.report.gallery import GAINS, PIXELATED_PX, differences, gallery, kinds, worst_images
from sdkd.compare.report.tables import HEADS, against_cells, against_remarks, against_title, markdown
from sdkd.compare.report.words import asked, findings, machine_line, method, models, notes
from sdkd.core.files import staged_folder, write_bytes, write_json
from sdkd.core.interrupts import between_steps
from sdkd.core.marks import COMPARISON
from sdkd.core.outputs import Input, check_parts_free, is_replaceable
from sdkd.core.replace import put, sweep_inside, temporary, temporary_folder

PARTS = ("images", "report.md", "report.html", "report.json")  # the JSON last: it is there only when all is
# What the gallery can show: value, name, and a short name for a narrow screen.
SHOWS = (
    ("image", "Image", "Image"),
    ("reference", "Reference", "Reference"),
    *((gain, f"Difference × {gain}", f"Difference × {gain}" if gain == GAINS[0] else f"× {gain}") for gain in GAINS),
)
WIDE, NARROW = (540, 340), (350, 330)
STAIRS_WIDE = 1080
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


def check_report_free(folder: Path, overwrite: bool, inputs: Sequence[Input] = ()) -> None:
    """As `sdkd.core.outputs.check_free`, for the parts of a report; other files in `folder` do not matter."""
    check_parts_free(folder, COMPARISON, PARTS, overwrite, inputs)


def write_report(report: Report, folder: str | Path, overwrite: bool = False) -> Path:
    """Write report.json, report.md, report.html and images/ into `folder`; gives the path of the HTML page.

    Everything is made in a temporary folder first. A folder with nothing else in it is replaced in one step. Files of
    others in `folder` stay, and the parts are moved in among them: after a kill in between there is no report.json,
    never an old one beside new parts. Raises OutputExistsError.
    """
    folder = Path(folder)
    check_report_free(folder, overwrite)
    if is_replaceable(folder) and not (folder.exists() and any(path.name not in PARTS for path in folder.iterdir())):
        with staged_folder(folder) as staged:
            _write_parts(report, staged)
        return folder / "report.html"
    with temporary_folder(folder) as staged:
        _write_parts(report, staged)
        whole = temporary(folder / PARTS[-1], "partial")  # after a kill, the proof that the other parts are sdkd's
        with between_steps() as check:
            (staged / PARTS[-1]).replace(whole)
            (folder / PARTS[-1]).unlink(missing_ok=True)
            for part in PARTS[:-1]:
                (put if (staged / part).is_dir() else Path.replace)(staged / part, folder / part)
            whole.replace(folder / PARTS[-1])
            check()
    sweep_inside(folder)
    return folder / "report.html"


def _write_parts(report: Report, folder: Path) -> None:
    (folder / "images").mkdir()
    for row in report.results:
        for place, image in enumerate(report.images[row.subject.label]):
            image.save(folder / image_name(row.subject, place))
    write_bytes(folder / "report.md", markdown(report).encode())
    write_bytes(folder / "report.html", html_page(report).encode())
    write_json(folder / "report.json", report.to_json())


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
        "notes": notes(report),
        "findings": findings(report),
        "stairs": _stairs(report),
        "eight_bits": eight_bits,
        "latency": latency_bars(report),
        "ridges": latency_ridges(report),
        "memory": memory_bars(report),
        "memory_help": next(column.help for column in COLUMNS if column.key == "memory"),
        "title": full_title,
        "plots": drawn,
        "columns": shown_columns(report, page=True),
        "rows": _rows(report),
        "against": report.against,
        "against_heads": [("Subject", ""), *HEADS],
        "against_title": against_title,
        "against_rows": [(one.label, against_cells(one)) for one in (report.against.changes if report.against else ())],
        "against_remarks": against_remarks,
        "gallery": gallery(report),
        "differences": differences(report),
        "worst": worst_images(report),
        "kinds": kinds(report),
        "first_kind": next(iter(kinds(report)), "eager"),
        "shows": SHOWS,
        "againsts": [(kind, name, name) for kind, name in kinds(report).items()],
        "pixelated": max(report.setup.size) <= PIXELATED_PX,
        "environment": _environment(report),
        "versions": report.environment["versions"],
        "method": method(report),
        "rules": list(dict.fromkeys(row.verdict.rule for row in report.results if row.verdict)),
    }


def _stairs(report: Report) -> dict[str, Any] | None:
    """What the page shows of a staircase."""
    if not report.stairs:
        return None
    return {
        "title": stairs.title(report),
        "remarks": stairs.remarks(report),
        "wide": stairs.drawing(report, STAIRS_WIDE),
        "narrow": stairs.drawing(report, NARROW[0]),
        "heads": [(name, unit) for name, unit, _ in stairs.heads(report)],
        "rows": [(stair.change, stairs.cells(report, stair)[1:]) for stair in report.stairs],
    }


def _rows(report: Report) -> list[dict[str, Any]]:
    columns, colours = shown_columns(report, page=True), model_colours(report)
    best = {column.key: best_rows(column, report.results) for column in columns}
    return [
        {
            "subject": row.subject,
            "colour": colours[row.group],
            "unrepeatable": row.repeatable is False,
            "cells": [
                (column, column.cell(row), row.subject.label in best[column.key], column.cell(row) == EMPTY)
                for column in columns
            ],
        }
        for row in report.results
    ]


def _environment(report: Report) -> list[tuple[str, str]]:
    """Names and values for people, in a fixed order; what is not there is left out.

    Attention kernels of eager PyTorch are one entry where all subjects agree, one per subject otherwise.
    """
    here = report.environment
    shown = {**here, "date_utc": here["date_utc"].removesuffix("+00:00").replace("T", " ")}
    found = [(name, text) for key, name in _NAMES.items() if (text := _text(shown.get(key)))]
    kernels = {row.subject.label: row.attention for row in report.results if row.attention}
    if len(set(kernels.values())) == 1:
        kernels = {"eager PyTorch": next(iter(kernels.values()))}
    found += [(f"Attention, {label}", kernel) for label, kernel in kernels.items()]
    for precision, seen in report.ceilings.items():
        rates = f"{number(seen.flops_per_s / GIGA)} GFLOP/s, {number(seen.bytes_per_s / GIGA)} GB/s"
        found.append((f"Ceilings, {precision}", f"{rates} ({seen.how})"))
    schedulers = dict.fromkeys(str(row.run.scheduler) for row in report.results)
    return [*found, ("Scheduler, seed", f"{', '.join(schedulers)}, {report.setup.seed}")]


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {item}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
