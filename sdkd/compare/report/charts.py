"""The page's drawings as data: time per UNet step, how its calls spread, memory; and scatter plots as inline SVG."""

# Not matplotlib: its SVG of the scatters is six times as large, in fixed colours (no dark mode), without a spoken text.

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from sdkd.compare.measure.quality import Likeness
from sdkd.compare.measure.results import Report, Result
from sdkd.compare.measure.subjects import Subject
from sdkd.compare.report.columns import MB, memory_bytes, number
from sdkd.models.generation import Generation

COLOURS = 6  # custom properties --c0 to --c5 of the style sheet
FEW_TICKS = 5
RIDGE_BINS = 80
CHARACTER_PX = 6.4  # width of a 12 px letter, for placing labels
LINE_PX = 14.0
Ticks = tuple[tuple[float, str], ...]
"""Of an axis: percent of the track, and what is said there."""
Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels."""


def model_colours(report: Report) -> dict[tuple[str, Generation], int]:
    """A colour number per model and way to run it, in the order of the subjects."""
    keys = list(dict.fromkeys(row.group for row in report.results))
    return {key: index % COLOURS for index, key in enumerate(keys)}


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


@dataclass(frozen=True)
class Bar:
    """One bar, in percent of the track; for latencies also p10, p90, every sample, and how many lie off the axis."""

    subject: Subject
    text: str
    width: float
    note: str = ""
    low: float = 0.0
    high: float = 0.0
    samples: tuple[float, ...] = ()
    beyond: int = 0


@dataclass(frozen=True)
class BarGroup:
    """The bars of one model, on the scale of all."""

    model: str
    colour: int
    about: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class BarChart:
    """Bars grouped by model, and the axis' ticks; the last one has the unit."""

    groups: tuple[BarGroup, ...]
    ticks: Ticks


def latency_bars(report: Report) -> BarChart:
    """Time per UNet step; a few slow calls do not stretch the axis, they are counted in `beyond`."""
    top = nice_ceiling(max(row.unet_step_ms.p90 for row in report.results))

    def bar(row: Result) -> Bar:
        step = row.unet_step_ms
        ratio = row.step_speedup.get("teacher") or row.step_speedup.get("eager") or row.step_speedup.get("baseline")
        every = [sample / top * 100 for part in step.samples for sample in part]
        return Bar(
            subject=row.subject,
            text=f"{number(step.median)} ms",
            width=step.median / top * 100,
            note="" if ratio is None else "tie" if ratio.tie else f"{ratio.value:.2f}×",
            low=step.p10 / top * 100,
            high=step.p90 / top * 100,
            samples=tuple(dict.fromkeys(round(value, 1) for value in sorted(every) if value <= 100)),  # one per 0.1 %
            beyond=sum(value > 100 for value in every),
        )

    return _chart(report, top, "ms", bar)


def memory_bars(report: Report) -> BarChart:
    """Memory of each subject's process."""
    used = {row.subject.label: memory_bytes(row) / MB for row in report.results}
    top = nice_ceiling(max(used.values()))

    def bar(row: Result) -> Bar:
        megabytes = used[row.subject.label]
        return Bar(row.subject, f"{number(megabytes)} MB", max(0.0, megabytes / top * 100))

    return _chart(report, top, "MB", bar)


def _chart(report: Report, top: float, unit: str, bar: Callable[[Result], Bar]) -> BarChart:
    groups = []
    for key, colour in model_colours(report).items():
        rows = [row for row in report.results if row.group == key]
        role = f"{subject.role}, " if (subject := rows[0].subject).role not in ("model", subject.model_label) else ""
        run = dataclasses.replace(rows[0].run, scheduler=None)
        role += f"{run}, " if report.mixed else ""
        about = f"{role}{rows[0].unet_parameters / 1e6:,.1f} M UNet parameters"
        groups.append(BarGroup(subject.model_label, colour, about, tuple(map(bar, rows))))
    ticks = [(100 * step / (FEW_TICKS - 1), tick(top * step / (FEW_TICKS - 1))) for step in range(FEW_TICKS)]
    return BarChart(tuple(groups), (*ticks[:-1], (ticks[-1][0], f"{ticks[-1][1]} {unit}")))


@dataclass(frozen=True)
class Ridge:
    """How the calls of one subject spread: the outline of their histogram, and p10 to p90 in percent of the track."""

    label: str
    colour: int
    path: str
    low: float
    high: float
    text: str
    beyond: int


@dataclass(frozen=True)
class RidgeChart:
    """All calls over the median of their subject, on one axis; `median` is where 1 lies, in percent of the track."""

    ridges: tuple[Ridge, ...]
    ticks: Ticks
    median: float


def latency_ridges(report: Report) -> RidgeChart:
    """The distribution of every subject's UNet calls around its own median; calls off the axis are counted."""
    spreads = [row.unet_step_ms for row in report.results]
    low = 1 - max(0.05, min(0.5, max(1 - spread.p10 / spread.median for spread in spreads) * 1.6))
    high = 1 + max(0.15, min(2.0, max(spread.p90 / spread.median - 1 for spread in spreads) * 1.6))
    colours = model_colours(report)
    ridges = tuple(_ridge(row, colours[row.group], low, high) for row in report.results)
    at = 100 * (1 - low) / (high - low)
    half = ((100 + at) / 2, _signed((high - 1) / 2))
    return RidgeChart(ridges, ((0.0, _signed(low - 1)), (at, "median"), half, (100.0, _signed(high - 1))), at)


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}".removesuffix(".0").replace("-", "−") + "%"


def _ridge(row: Result, colour: int, low: float, high: float) -> Ridge:
    step = row.unet_step_ms

    def place(value: float) -> float:
        return 100 * (value / step.median - low) / (high - low)

    every = [place(sample) for part in step.samples for sample in part]
    counts = [0] * RIDGE_BINS
    for at in every:
        if 0 <= at < 100:
            counts[int(at * RIDGE_BINS / 100)] += 1
    width, most = 100 / RIDGE_BINS, max(counts)
    outline = "".join(f"V{20 - 19 * count / most:.1f}h{width:g}" for count in counts) if most else "H100"
    return Ridge(
        label=row.subject.label,
        colour=colour,
        path=f"M0 20{outline}V20z",
        low=max(0.0, place(step.p10)),
        high=min(100.0, place(step.p90)),
        text=f"{_signed(step.p10 / step.median - 1)} to {_signed(step.p90 / step.median - 1)}",
        beyond=sum(not 0 <= at < 100 for at in every),
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
    """Speed against likeness to own eager, likeness to the teacher, size on disk, and caption accuracy.

    Each only where two subjects have a value; the two kinds of likeness never share a plot.
    """
    colours = model_colours(report)

    def points(value: Callable[[Result], float | None]) -> tuple[Point, ...]:
        values = [(row, value(row)) for row in report.results]
        return tuple(
            Point(row.images_per_s, y, row.subject.runs_as, colours[row.group], row.subject.is_eager)
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


def _grid(plot: Plot, box: Box, x_top: float) -> list[str]:
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


def place_labels(labels: Sequence[str], marks: Sequence[tuple[float, float]], box: Box) -> list[tuple[float, float]]:
    """Where each label's text begins (x, baseline y): the nearest of many places that is free and inside `box`."""
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in marks]
    spots = []
    for label, (x, y) in zip(labels, marks, strict=True):
        width = CHARACTER_PX * len(label)
        sides = (9.0, -9.0 - width, -width / 2)
        near = [(9.0, 0.0), (-9.0 - width, 0.0), (-width / 2, -15.0), (-width / 2, 15.0)]
        far = [(side, 15.0 * rows * sign) for rows in range(1, 7) for sign in (-1, 1) for side in sides]
        tried = [(x + dx, y + dy + 4) for dx, dy in (*near, *far)]
        areas = {spot: (spot[0] - 2, spot[1] - 11, spot[0] + width + 2, spot[1] + 3) for spot in tried}
        tried = [spot for spot in tried if _within(areas[spot], box)] or tried[:1]
        spot = next((spot for spot in tried if not any(_overlap(areas[spot], other) for other in taken)), tried[0])
        taken.append(areas[spot])
        spots.append(spot)
    return spots


def _within(one: Box, box: Box) -> bool:
    return one[0] >= box[0] and one[1] >= box[1] and one[2] <= box[2] and one[3] <= box[3]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
