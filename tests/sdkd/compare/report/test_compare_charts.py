"""Bars, ticks and scatter plots: positions follow the figures, labels keep out of each other's way."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
from planted_report import planted_report

from sdkd.compare.measure.environment import Memory
from sdkd.compare.measure.stats import Spread
from sdkd.compare.report.charts import (
    RIDGE_BINS,
    latency_bars,
    latency_ridges,
    memory_bars,
    nice_ceiling,
    place_labels,
    plots,
    scatter,
    tick,
)
from sdkd.compare.report.columns import memory_bytes


def test_axes_end_on_a_round_number_and_ticks_are_short() -> None:
    ends = {0.93: 1.0, 1.0: 1.0, 1.01: 1.2, 31.8: 40.0, 99.0: 100.0, 0.0: 1.0, 5534.0: 6000.0}
    assert [nice_ceiling(value) for value in ends] == pytest.approx(list(ends.values()))
    assert [tick(value) for value in (0.0, 2.5, 10.0, 1500.0, 0.125)] == ["0", "2.5", "10", "1,500", "0.125"]


def test_bars_are_grouped_by_model_on_one_scale() -> None:
    report = planted_report()
    chart = latency_bars(report)
    groups = chart.groups
    assert [(group.model, group.colour) for group in groups] == [("teacher", 0), ("small", 1), ("tiny", 2)]
    assert groups[2].about == "student, 1.2 M UNet parameters"
    assert (chart.ticks[0], chart.ticks[-1]) == ((0.0, "0"), (100.0, "40 ms"))
    for bar in (bar for group in groups for bar in group.bars):
        step = report.result(bar.subject.label).unet_step_ms
        assert bar.width == pytest.approx(step.median / 40 * 100)
        assert bar.low <= bar.width <= bar.high <= 100
        assert 3 < len(bar.samples) <= step.count
        assert bar.beyond == 0
    assert [groups[0].bars[0].note, groups[2].bars[3].note] == ["", "6.80×"]


def test_a_model_that_is_run_in_two_ways_has_two_groups() -> None:
    groups = latency_bars(planted_report(few="tiny")).groups
    assert [group.about.partition(", 1.2 M")[0] for group in groups][2] == "student, 4 steps, guidance 1"
    report = planted_report()
    few = dataclasses.replace(report.result("tiny openvino"), run=planted_report(few="tiny").result("tiny eager").run)
    both = dataclasses.replace(report, results=(*report.results, few))
    assert [(group.model, group.colour, len(group.bars)) for group in latency_bars(both).groups[2:]] == [
        ("tiny", 2, 4),
        ("tiny", 3, 1),
    ]


def test_calls_beyond_the_axis_are_counted() -> None:
    report = planted_report(models=("teacher",))
    slow = Spread.of([[30.0] * 40, [31.0] * 7, [900.0, 950.0, 31.0]])
    row = dataclasses.replace(report.results[0], unet_step_ms=slow)
    one = dataclasses.replace(report, results=(row, *report.results[1:]))
    bar = latency_bars(one).groups[0].bars[0]
    assert bar.beyond == latency_ridges(one).ridges[0].beyond == 2
    assert len(bar.samples) == 2  # equal ones are drawn once


def test_ridges_are_histograms_around_the_median() -> None:
    report = planted_report()
    chart = latency_ridges(report)
    assert [ridge.label for ridge in chart.ridges] == [row.subject.label for row in report.results]
    assert [text for _, text in chart.ticks] == ["−5%", "median", "+7.5%", "+15%"]
    assert chart.median == pytest.approx(25.0)
    for ridge in chart.ridges:
        assert 0 <= ridge.low <= chart.median <= ridge.high <= 100
        heights = [20 - float(top) for top in re.findall(r"V([\d.]+)h", ridge.path)]
        assert len(heights) == RIDGE_BINS
        assert max(heights) == pytest.approx(19, abs=0.1)  # the fullest bin
    assert chart.ridges[0].text.startswith("−")


def test_memory_is_drawn_on_one_scale() -> None:
    report = planted_report()
    shared = [dataclasses.replace(row, memory=Memory(growth=52_000_000)) for row in report.results]  # in one process
    half = dataclasses.replace(shared[0], memory=Memory(growth=26_000_000))
    chart = memory_bars(dataclasses.replace(report, results=(half, *shared[1:])))
    assert chart.ticks[-1] == (100.0, "60 MB")
    first, second = chart.groups[0].bars[:2]
    assert (first.text, second.text) == ("26.0 MB", "52.0 MB")
    assert second.width == pytest.approx(2 * first.width)
    assert memory_bytes(report.results[0]) == report.results[0].memory.peak_rss  # in a process of its own
    assert memory_bytes(dataclasses.replace(half, memory=Memory(peak_rss=5, peak_gpu=7))) == 7


def test_each_plot_has_the_subjects_with_a_value() -> None:
    """Likeness to eager and to the teacher never share a plot."""
    every = plots(planted_report())
    titles = [f"Speed and {what}" for what in ("likeness to own eager", "likeness to the teacher", "size", "captions")]
    assert [plot.title for plot in every] == titles
    assert [len(plot.points) for plot in every] == [9, 8, 12, 12]  # engines; students, eager ones too; all
    assert not any(point.hollow for point in every[0].points)
    assert [every[0].y_range, every[2].y_range, every[3].y_range[1]] == [(20.0, 60.0), (0.0, 20.0), 1.0]
    for plot in every:
        assert all(plot.y_range[0] <= point.y <= plot.y_range[1] for point in plot.points)
    assert [plot.title for plot in plots(planted_report(judged=False))] == titles[:3]
    assert [plot.title for plot in plots(planted_report(models=("teacher",)))] == [titles[0], *titles[2:]]


def test_faster_is_further_right_and_larger_is_further_up() -> None:
    size = plots(planted_report())[2]
    drawn = scatter(size, 540, 340)
    assert [drawn.count(each) for each in ("<circle", 'class="name"', "<polyline")] == [12, 12, 3]
    marks = [tuple(map(float, pair)) for pair in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    by_speed = sorted(zip((point.x for point in size.points), marks, strict=True))
    assert [x for _, (x, _) in by_speed] == sorted(x for x, _ in marks)
    by_size = sorted(zip((point.y for point in size.points), marks, strict=True))
    assert [y for _, (_, y) in by_size] == sorted((y for _, y in marks), reverse=True)
    hostile = dataclasses.replace(size.points[0], label="<script>")
    assert "<script>" not in scatter(dataclasses.replace(size, points=(hostile, size.points[1])), 540, 340)


def test_labels_of_crowded_marks_do_not_overlap() -> None:
    marks = [(200.0 + 3 * index, 100.0) for index in range(6)]
    spots = place_labels(["openvino-bf16"] * 6, marks, (0, 0, 540, 340))
    boxes = [(x, y - 11, x + 6.4 * 13, y + 3) for x, y in spots]
    for one, other in itertools.combinations(boxes, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    assert all(box[0] >= 0 and box[2] <= 540 for box in boxes)
