"""The comparison as one self-contained HTML page: template, style and script are package data, images are data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from sdkd.compare.against_tables import HEADS, cells, remarks, title
from sdkd.compare.charts import latency_bars, model_colours, plots, scatter
from sdkd.compare.quality import Likeness
from sdkd.compare.report import Report, Result
from sdkd.compare.tables import EMPTY, best_rows, shown_columns
from sdkd.compare.words import asked, findings, machine_line, method, models, noise_note

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST_EMBEDDED_PX = 320  # larger images are shown smaller on the page; the originals are beside it
PIXELATED_PX = 160  # up to this side an image is enlarged with square pixels
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


@dataclass(frozen=True)
class Shot:
    """One image of the gallery: its data URI, its key, and the keys of the images it can be subtracted from."""

    key: str
    source: str
    alt: str
    label: str
    caption: str
    caption_teacher: str
    eager: str
    teacher: str


def data_uri(image: Image) -> str:
    """A PNG data URI, at most LARGEST_EMBEDDED_PX on a side."""
    shown = image.copy()
    if max(shown.size) > LARGEST_EMBEDDED_PX:
        shown.thumbnail((LARGEST_EMBEDDED_PX, LARGEST_EMBEDDED_PX))
    stream = io.BytesIO()
    shown.save(stream, "PNG", optimize=max(shown.size) <= PIXELATED_PX)  # minutes for many large ones
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def html_page(report: Report) -> str:
    """The whole page; nothing in it refers to anything outside it."""
    from jinja2 import Environment, StrictUndefined

    files = resources.files("sdkd.compare")
    engine = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = engine.from_string((files / "page.html").read_text(encoding="utf-8"))
    return template.render(
        style=(files / "page.css").read_text(encoding="utf-8"),
        script=(files / "page.js").read_text(encoding="utf-8"),
        **_context(report),
    )


def _context(report: Report) -> dict[str, Any]:
    groups, ticks = latency_bars(report)
    drawn = [{"title": plot.title, "wide": scatter(plot, *WIDE), "narrow": scatter(plot, *NARROW)}
             for plot in plots(report)]  # fmt: skip
    return {
        "report": report,
        "models": models(report),
        "asked": asked(report).replace(" × ", "\u00a0×\u00a0").replace(" px", "\u00a0px"),
        "machine": machine_line(report),
        "notes": [note for note in (noise_note(report), *report.notes) if note],
        "findings": findings(report),
        "groups": groups,
        "ticks": ticks,
        "plots": drawn,
        "columns": shown_columns(report, page=True),
        "rows": _rows(report),
        "against": _against(report),
        "gallery": _gallery(report),
        "pixelated": report.setup.size_px <= PIXELATED_PX,
        "views": _views(report),
        "environment": _environment(report.environment),
        "versions": report.environment["versions"],
        "attention": _attention(report),
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


def _views(report: Report) -> list[tuple[str, str]]:
    """Ways to look at the images: (value, label)."""
    views = [("image", "Images")]
    if any(row.against_eager and _is_shown(report, row.against_eager.reference) for row in report.results):
        views.append(("eager", "Difference from own eager, ×8"))
    if any(row.against_teacher and _is_shown(report, row.against_teacher.reference) for row in report.results):
        views.append(("teacher", "Difference from the teacher, ×8"))
    return views


def _is_shown(report: Report, label: str) -> bool:
    return label in report.images


def _gallery(report: Report) -> list[tuple[str, list[Shot]]]:
    """The prompt of every image, with one shot per subject."""
    return [
        (prompt, [_shot(report, row, index) for row in report.results])
        for index, prompt in enumerate(report.setup.image_prompts)
    ]


def _shot(report: Report, row: Result, index: int) -> Shot:
    slugs = {other.subject.label: other.subject.slug for other in report.results}
    subject, prompt = row.subject, report.setup.image_prompts[index]
    eager = row.against_eager.reference if row.against_eager else ""
    teacher = row.against_teacher.reference if row.against_teacher else ""
    return Shot(
        key=f"{subject.slug}-{index}",
        source=data_uri(report.images[subject.label][index]),
        alt=f"{subject.label}: {prompt}",
        label=subject.label,
        caption=_caption(row.against_eager, index),
        caption_teacher=_caption(row.against_teacher, index),
        eager=f"{slugs[eager]}-{index}" if eager in slugs else "",
        teacher=f"{slugs[teacher]}-{index}" if teacher in slugs else "",
    )


def _caption(found: Likeness | None, index: int) -> str:
    if found is None:
        return ""
    value = found.per_image[index].psnr_db
    return "identical" if value is None else f"{value:.1f} dB"


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
