"""The page's scatter plots as data and inline SVG; no library, no script."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from sdkd.compare.measure.quality import Likeness
from sdkd.compare.measure.results import Report, Result
from sdkd.compare.report.bars import FEW_TICKS, model_colours, nice_ceiling, tick
from sdkd.compare.report.cells import number
from sdkd.compare.report.tables import MB

CHARACTER_PX = 6.4  # width of a 12 px letter, for placing labels
LINE_PX = 14.0


@dataclass(frozen=True)
class Point:
    """One mark of a scatter plot, in the axes' units."""

    x: float
    y: float
    label: str
    colour: int
    hollow: bool


@dataclass(frozen=True)
class Plot:
    """A scatter plot: its title, what the axes mean, and its marks."""

    title: str
    x_title: str
    y_title: str
    y_text: Callable[[float], str]
    points: tuple[Point, ...]
    y_range: tuple[float, float]


def plots(report: Report) -> list[Plot]:
    """Speed against likeness to own eager, likeness to the teacher, size on disk, and caption accuracy.

    Each only where two subjects have a value; the two kinds of likeness never share a plot.
    """
    colours = model_colours(report)

    def points(value: Callable[[Result], float | None]) -> tuple[Point, ...]:
        values = [(row, value(row)) for row in report.results]
        return tuple(
            Point(row.images_per_s, y, row.subject.runs_as, colours[row.subject.model_key], row.subject.is_eager)
            for row, y in values
            if y is not None
        )

    def likenesses(pick: Callable[[Result], Likeness | None]) -> tuple[Point, ...]:
        return points(lambda row: None if (found := pick(row)) is None else found.psnr_mean_db)

    size = points(lambda row: None if row.bytes_on_disk is None else row.bytes_on_disk / MB)
    own, teacher = likenesses(lambda row: row.against_eager), likenesses(lambda row: row.against_teacher)
    right = points(lambda row: row.judged_mean)
    speed, top = "images per second →", nice_ceiling(max((point.y for point in size), default=1.0))
    low = max(0.0, math.floor(min((point.y for point in right), default=1.0) * 5 - 0.5) / 5)  # fractions: no zero
    drawn = [
        Plot("Speed and likeness to own eager", speed, "dB PSNR, 100 is identical", tick, own, _decibels(own)),
        Plot("Speed and likeness to the teacher", speed, "dB PSNR", tick, teacher, _decibels(teacher)),
        Plot("Speed and size", speed, "MB on disk", tick, size, (0.0, top)),
        Plot("Speed and captions", speed, "caption attributes right", "{:.0%}".format, right, (low, 1.0)),
    ]
    return [plot for plot in drawn if len(plot.points) > 1]


def _decibels(points: Sequence[Point]) -> tuple[float, float]:
    """An axis for PSNR, in steps of 20 dB (5 where all lie closer): decibels need no zero."""
    values = [point.y for point in points] or [0.0]
    step = 20.0 if max(values) - min(values) > 15 else 5.0
    low = math.floor((min(values) - 1) / step) * step
    return max(0.0, low), max(math.ceil(max(values) / step) * step, low + step)


def scatter(plot: Plot, width: int, height: int) -> str:
    """An SVG of the plot: marks of a model are joined, labels avoid marks and each other."""
    left, right, top, bottom = 46, 16, 30, 42
    x_top = nice_ceiling(max(point.x for point in plot.points))
    y_low, y_top = plot.y_range

    def place(point: Point) -> tuple[float, float]:
        x = left + (width - left - right) * point.x / x_top
        return x, height - bottom - (height - top - bottom) * (point.y - y_low) / (y_top - y_low)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(_spoken(plot))}">']
    parts += _grid(plot, (left, top, width - right, height - bottom), x_top)
    marks = [place(point) for point in plot.points]
    parts += _paths(plot.points, marks)
    spots = place_labels([point.label for point in plot.points], marks, (left, 14, width, height - bottom))
    for point, (x, y), spot in zip(plot.points, marks, spots, strict=True):
        parts.append(_mark(point, x, y, spot))
    return "".join([*parts, "</svg>"])


def _spoken(plot: Plot) -> str:
    each = "; ".join(f"{p.label}: {number(p.x)} images per second, {plot.y_text(p.y)}" for p in plot.points)
    return f"{plot.title}. {each}"


def _grid(plot: Plot, box: tuple[float, float, float, float], x_top: float) -> list[str]:
    left, top, right, bottom = box
    low, high = plot.y_range
    parts = []
    for step in range(FEW_TICKS):
        share = step / (FEW_TICKS - 1)
        x, y = left + (right - left) * share, bottom - (bottom - top) * share
        kind = "grid" if step else "axis"
        parts.append(f'<line class="{kind}" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        text = escape(plot.y_text(low + (high - low) * share))
        parts.append(f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        anchor = "end" if step == FEW_TICKS - 1 else "middle"
        label = tick(x_top * share)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 17:.1f}" text-anchor="{anchor}">{label}</text>')
    parts.append(f'<text class="title" x="0" y="12">{escape(plot.y_title)}</text>')
    parts.append(f'<text class="title" x="{right}" y="{bottom + 36}" text-anchor="end">{escape(plot.x_title)}</text>')
    return parts


def _paths(points: Sequence[Point], marks: Sequence[tuple[float, float]]) -> list[str]:
    """A line through the marks of each model, slowest first."""
    parts = []
    for colour in dict.fromkeys(point.colour for point in points):
        own = sorted(mark for point, mark in zip(points, marks, strict=True) if point.colour == colour)
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in own)
        parts.append(f'<polyline class="path" points="{line}" style="stroke:var(--c{colour})"/>')
    return parts


def _mark(point: Point, x: float, y: float, spot: tuple[float, float]) -> str:
    style = f"stroke:var(--c{point.colour});fill:var({'--page' if point.hollow else f'--c{point.colour}'})"
    text_x, text_y = spot
    far = abs(text_y - 4 - y) > LINE_PX or not -1 <= text_x - x <= 24
    near_x = min(max(x, text_x), text_x + CHARACTER_PX * len(point.label))
    leader = f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{near_x:.1f}" y2="{text_y - 4:.1f}"/>' if far else ""
    return (
        f'{leader}<circle cx="{x:.1f}" cy="{y:.1f}" r="5" style="{style}"/>'
        f'<text class="name" x="{text_x:.1f}" y="{text_y:.1f}">{escape(point.label)}</text>'
    )


Box = tuple[float, float, float, float]


def place_labels(labels: Sequence[str], marks: Sequence[tuple[float, float]], box: Box) -> list[tuple[float, float]]:
    """Where each label's text begins (x, baseline y): the nearest of many places that is free and inside `box`."""
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in marks]
    spots = []
    for label, (x, y) in zip(labels, marks, strict=True):
        width = CHARACTER_PX * len(label)
        tried = [(x + dx, y + dy + 4) for dx, dy in _offsets(width)]
        inside = [spot for spot in tried if _inside(_area(spot, width), box)] or tried[:1]
        spot = next((spot for spot in inside if not _overlaps(_area(spot, width), taken)), inside[0])
        taken.append(_area(spot, width))
        spots.append(spot)
    return spots


def _offsets(width: float) -> list[tuple[float, float]]:
    sides = (9.0, -9.0 - width, -width / 2)
    near = [(9.0, 0.0), (-9.0 - width, 0.0), (-width / 2, -15.0), (-width / 2, 15.0)]
    shifts = [shift * sign for shift in (15.0, 30.0, 45.0, 60.0, 75.0, 90.0) for sign in (-1, 1)]
    return near + [(side, shift) for shift in shifts for side in sides]


def _area(spot: tuple[float, float], width: float) -> Box:
    return spot[0] - 2, spot[1] - 11, spot[0] + width + 2, spot[1] + 3


def _inside(area: Box, box: Box) -> bool:
    return area[0] >= box[0] and area[1] >= box[1] and area[2] <= box[2] and area[3] <= box[3]


def _overlaps(area: Box, taken: Sequence[Box]) -> bool:
    return any(area[0] < b[2] and b[0] < area[2] and area[1] < b[3] and b[1] < area[3] for b in taken)
