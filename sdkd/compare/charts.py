"""The page's drawings as data and inline SVG: latency bars and scatter plots; no library, no script."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from sdkd.compare.report import Report, Result
from sdkd.compare.tables import number

COLOURS = 6  # custom properties --c0 to --c5 of the style sheet
CHARACTER_PX = 6.4  # width of a 12 px letter, for placing labels
LINE_PX = 14.0
FEW_TICKS = 5


def model_colours(report: Report) -> dict[str, int]:
    """A colour number per model, in the order of the subjects."""
    keys = list(dict.fromkeys(row.subject.model_key for row in report.results))
    return {key: index % COLOURS for index, key in enumerate(keys)}


@dataclass(frozen=True)
class Bar:
    """One latency bar, in percent of the track: median, p10, p90 and every sample."""

    label: str
    target: str
    eager: bool
    text: str
    note: str
    width: float
    low: float
    high: float
    samples: tuple[float, ...]


@dataclass(frozen=True)
class BarGroup:
    """The bars of one model, on the scale of all."""

    model: str
    colour: int
    about: str
    bars: tuple[Bar, ...]


def nice_ceiling(value: float) -> float:
    """The smallest of 1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8 times a power of ten that is at least `value`."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    steps = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
    return next((step * power for step in steps if step * power >= value * 0.999999), 10 * power)


def tick(value: float) -> str:
    """A tick's number, as short as it goes: 0, 2.5, 10, 1,500."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def latency_bars(report: Report) -> tuple[list[BarGroup], list[tuple[float, str]]]:
    """Bars grouped by model, and the axis' ticks as (percent, text); samples beyond the axis are left out."""
    longest = max(row.unet_step_ms.p90 for row in report.results)
    top = nice_ceiling(longest)
    colours, groups = model_colours(report), []
    for key, colour in colours.items():
        rows = [row for row in report.results if row.subject.model_key == key]
        role = f"{subject.role}, " if (subject := rows[0].subject).role not in ("model", subject.model_label) else ""
        about = f"{role}{rows[0].unet_parameters / 1e6:,.1f} M UNet parameters"
        groups.append(BarGroup(subject.model_label, colour, about, tuple(_bar(row, top) for row in rows)))
    ticks = [(25.0 * part, tick(top * part / 4)) for part in range(5)]
    return groups, ticks


def _bar(row: Result, top: float) -> Bar:
    step = row.unet_step_ms
    ratio = row.step_speedup.get("teacher") or row.step_speedup.get("eager") or row.step_speedup.get("baseline")
    note = "" if ratio is None else "tie" if ratio.tie else f"{ratio.value:.2f}×"
    every = [sample / top * 100 for part in step.samples for sample in part]
    return Bar(
        label=row.subject.label,
        target=row.subject.runs_as,
        eager=row.subject.is_eager,
        text=f"{number(step.median)} ms",
        note=note,
        width=step.median / top * 100,
        low=step.p10 / top * 100,
        high=step.p90 / top * 100,
        samples=tuple(round(value, 2) for value in every if value <= 100)[:200],
    )


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
    """Speed against size on disk, and against caption accuracy where there was a judge."""
    colours = model_colours(report)

    def points(value: Callable[[Result], float | None]) -> tuple[Point, ...]:
        found = []
        for row in report.results:
            y = value(row)
            if y is not None:
                colour, hollow = colours[row.subject.model_key], row.subject.is_eager
                found.append(Point(row.images_per_s, y, row.subject.runs_as, colour, hollow))
        return tuple(found)

    size = points(lambda row: None if row.bytes_on_disk is None else row.bytes_on_disk / 1e6)
    right = points(lambda row: row.judged_mean)
    drawn = []
    if len(size) > 1:
        top = nice_ceiling(max(point.y for point in size))
        drawn.append(Plot("Speed and size", "images per second →", "MB on disk", tick, size, (0.0, top)))
    if len(right) > 1:
        low = max(0.0, math.floor(min(point.y for point in right) * 5 - 0.5) / 5)  # fractions: no zero needed
        title = "Speed and captions"
        drawn.append(Plot(title, "images per second →", "caption attributes right", "{:.0%}".format, right, (low, 1.0)))
    return drawn


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
