"""The page's bars and histograms as data: time per UNet step, how its calls spread, memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sdkd.compare.measure.results import Report, Result
from sdkd.compare.report.cells import number
from sdkd.compare.report.tables import MB, memory_bytes

COLOURS = 6  # custom properties --c0 to --c5 of the style sheet
FEW_TICKS = 5
RIDGE_BINS = 80


def model_colours(report: Report) -> dict[str, int]:
    """A colour number per model, in the order of the subjects."""
    keys = list(dict.fromkeys(row.subject.model_key for row in report.results))
    return {key: index % COLOURS for index, key in enumerate(keys)}


@dataclass(frozen=True)
class Bar:
    """One bar, in percent of the track; for latencies also p10, p90, every sample, and how many lie off the axis."""

    label: str
    target: str
    eager: bool
    text: str
    note: str
    width: float
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
    """Bars grouped by model, and the axis' ticks as (percent, text); the last one has the unit."""

    groups: tuple[BarGroup, ...]
    ticks: tuple[tuple[float, str], ...]


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


def latency_bars(report: Report) -> BarChart:
    """Time per UNet step; a few slow calls do not stretch the axis, they are counted in `beyond`."""
    top = nice_ceiling(max(row.unet_step_ms.p90 for row in report.results))
    return _chart(report, top, "ms", lambda row: _latency_bar(row, top))


def memory_bars(report: Report) -> BarChart:
    """Memory of each subject's process."""
    top = nice_ceiling(max(memory_bytes(row) / MB for row in report.results))
    return _chart(report, top, "MB", lambda row: _memory_bar(row, top))


def _chart(report: Report, top: float, unit: str, bar: Callable[[Result], Bar]) -> BarChart:
    groups = []
    for key, colour in model_colours(report).items():
        rows = [row for row in report.results if row.subject.model_key == key]
        role = f"{subject.role}, " if (subject := rows[0].subject).role not in ("model", subject.model_label) else ""
        about = f"{role}{rows[0].unet_parameters / 1e6:,.1f} M UNet parameters"
        groups.append(BarGroup(subject.model_label, colour, about, tuple(map(bar, rows))))
    ticks = [(100 * step / (FEW_TICKS - 1), tick(top * step / (FEW_TICKS - 1))) for step in range(FEW_TICKS)]
    return BarChart(tuple(groups), (*ticks[:-1], (ticks[-1][0], f"{ticks[-1][1]} {unit}")))


def _latency_bar(row: Result, top: float) -> Bar:
    step = row.unet_step_ms
    ratio = row.step_speedup.get("teacher") or row.step_speedup.get("eager") or row.step_speedup.get("baseline")
    every = [sample / top * 100 for part in step.samples for sample in part]
    return Bar(
        label=row.subject.label,
        target=row.subject.runs_as,
        eager=row.subject.is_eager,
        text=f"{number(step.median)} ms",
        note="" if ratio is None else "tie" if ratio.tie else f"{ratio.value:.2f}×",
        width=step.median / top * 100,
        low=step.p10 / top * 100,
        high=step.p90 / top * 100,
        samples=tuple(dict.fromkeys(round(value, 1) for value in sorted(every) if value <= 100)),  # one per 0.1 %
        beyond=sum(value > 100 for value in every),
    )


def _memory_bar(row: Result, top: float) -> Bar:
    used, subject = memory_bytes(row) / MB, row.subject
    width = max(0.0, used / top * 100)
    return Bar(subject.label, subject.runs_as, subject.is_eager, f"{number(used)} MB", "", width)


@dataclass(frozen=True)
class Ridge:
    """How the calls of one subject spread: the outline of their histogram, and p10 to p90 in percent of the track."""

    target: str
    colour: int
    path: str
    low: float
    high: float
    text: str
    beyond: int


@dataclass(frozen=True)
class RidgeChart:
    """All calls over the median of their subject, on one axis; `median` is where 1 lies, in percent of the track."""

    ridges: tuple[tuple[str, Ridge], ...]  # with the subject's label
    ticks: tuple[tuple[float, str], ...]
    median: float


def latency_ridges(report: Report) -> RidgeChart:
    """The distribution of every subject's UNet calls around its own median; calls off the axis are counted."""
    spreads = {row.subject.label: row.unet_step_ms for row in report.results}
    low = 1 - max(0.05, min(0.5, max(1 - spread.p10 / spread.median for spread in spreads.values()) * 1.6))
    high = 1 + max(0.15, min(2.0, max(spread.p90 / spread.median - 1 for spread in spreads.values()) * 1.6))
    colours = model_colours(report)
    ridges = tuple(
        (row.subject.label, _ridge(row, colours[row.subject.model_key], low, high)) for row in report.results
    )
    at = 100 * (1 - low) / (high - low)
    ticks = (
        (0.0, _signed(low - 1)),
        (at, "median"),
        ((100 + at) / 2, _signed((high - 1) / 2)),
        (100.0, _signed(high - 1)),
    )
    return RidgeChart(ridges, ticks, at)


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
        target=row.subject.runs_as,
        colour=colour,
        path=f"M0 20{outline}V20z",
        low=max(0.0, place(step.p10)),
        high=min(100.0, place(step.p90)),
        text=f"{_signed(step.p10 / step.median - 1)} to {_signed(step.p90 / step.median - 1)}",
        beyond=sum(not 0 <= at < 100 for at in every),
    )
