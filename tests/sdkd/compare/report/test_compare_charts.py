"""Bars, ticks and scatter plots: positions follow the figures, labels keep out of each other's way."""

from __future__ import annotations

import dataclasses
import re

import pytest
from planted_report import planted_report

from sdkd.compare.measure.environment import Memory
from sdkd.compare.measure.stats import Spread
from sdkd.compare.report.bars import RIDGE_BINS, latency_bars, latency_ridges, memory_bars, nice_ceiling, tick
from sdkd.compare.report.charts import place_labels, plots, scatter
from sdkd.compare.report.tables import memory_bytes


@pytest.mark.parametrize(
    ("value", "top"), [(0.93, 1.0), (1.0, 1.0), (1.01, 1.2), (31.8, 40.0), (99.0, 100.0), (0.0, 1.0), (5534.0, 6000.0)]
)
def test_axes_end_on_a_round_number(value: float, top: float) -> None:
    assert nice_ceiling(value) == pytest.approx(top)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (2.5, "2.5"), (10.0, "10"), (1500.0, "1,500"), (0.125, "0.125")]
)
def test_ticks_are_short(value: float, text: str) -> None:
    assert tick(value) == text


def test_bars_are_grouped_by_model_on_one_scale() -> None:
    report = planted_report()
    chart = latency_bars(report)
    groups, ticks = chart.groups, chart.ticks
    assert [(group.model, group.colour) for group in groups] == [("teacher", 0), ("small", 1), ("tiny", 2)]
    assert groups[2].about == "student, 1.2 M UNet parameters"
    assert ticks[0] == (0.0, "0")
    assert ticks[-1] == (100.0, "40 ms")
    for group in groups:
        for bar in group.bars:
            step = report.result(bar.label).unet_step_ms
            assert bar.width == pytest.approx(step.median / 40 * 100)
            assert bar.low <= bar.width <= bar.high <= 100
            assert 3 < len(bar.samples) <= step.count
            assert bar.beyond == 0
    eager = groups[0].bars[0]
    assert (eager.target, eager.eager, eager.note) == ("eager", True, "")
    assert groups[2].bars[3].note == "6.80×"


def test_calls_beyond_the_axis_are_counted() -> None:
    report = planted_report(models=("teacher",))
    slow = Spread.of([[30.0] * 40, [31.0] * 7, [900.0, 950.0, 31.0]])
    row = dataclasses.replace(report.results[0], unet_step_ms=slow)
    one = dataclasses.replace(report, results=(row, *report.results[1:]))
    bar = latency_bars(one).groups[0].bars[0]
    assert bar.beyond == 2
    assert len(bar.samples) == 2  # equal ones are drawn once
    assert latency_ridges(one).ridges[0][1].beyond == 2


def test_ridges_are_histograms_around_the_median() -> None:
    report = planted_report()
    chart = latency_ridges(report)
    assert [label for label, _ in chart.ridges] == [row.subject.label for row in report.results]
    assert [text for _, text in chart.ticks] == ["−5%", "median", "+7.5%", "+15%"]
    assert chart.median == pytest.approx(25.0)
    for _, ridge in chart.ridges:
        assert 0 <= ridge.low <= chart.median <= ridge.high <= 100
        heights = [20 - float(top) for top in re.findall(r"V([\d.]+)h", ridge.path)]
        assert len(heights) == RIDGE_BINS
        assert max(heights) == pytest.approx(19, abs=0.1)  # the fullest bin
    assert chart.ridges[0][1].text.startswith("−")


def test_memory_is_drawn_on_one_scale() -> None:
    report = planted_report()
    shared = [dataclasses.replace(row, memory=Memory()) for row in report.results]  # all in one process
    half = dataclasses.replace(shared[0], rss_growth_bytes=26_000_000)
    chart = memory_bars(dataclasses.replace(report, results=(half, *shared[1:])))
    assert chart.ticks[-1] == (100.0, "60 MB")
    first, second = chart.groups[0].bars[:2]
    assert (first.text, second.text) == ("26.0 MB", "52.0 MB")
    assert second.width == pytest.approx(2 * first.width)
    assert memory_bytes(report.results[0]) == report.results[0].memory.peak_rss  # in a process of its own
    assert memory_bytes(dataclasses.replace(half, memory=Memory(peak_rss=5, peak_gpu=7))) == 7


def test_one_mark_and_one_label_per_subject() -> None:
    eager, teacher, size, captions = plots(planted_report())
    for plot in (size, captions):
        drawn = scatter(plot, 540, 340)
        assert drawn.count("<circle") == len(plot.points) == 12
        assert drawn.count('class="name"') == 12
        assert drawn.count("<polyline") == 3
    assert size.y_range == (0.0, 20.0)
    assert captions.y_range[1] == 1.0
    assert [plot.title for plot in plots(planted_report(judged=False))] == [eager.title, teacher.title, size.title]


def test_likeness_to_eager_and_to_the_teacher_never_share_a_plot() -> None:
    report = planted_report()
    eager, teacher = plots(report)[:2]
    assert eager.title == "Speed and likeness to own eager"
    assert len(eager.points) == 9  # engines
    assert not any(point.hollow for point in eager.points)
    assert teacher.title == "Speed and likeness to the teacher"
    assert len(teacher.points) == 8  # students, eager ones too
    for plot in (eager, teacher):
        low, high = plot.y_range
        assert all(low <= point.y <= high for point in plot.points)
    assert eager.y_range == (20.0, 60.0)
    titles = [plot.title for plot in plots(planted_report(models=("teacher",)))]
    assert titles == [eager.title, "Speed and size", "Speed and captions"]


def test_faster_is_further_right_and_larger_is_further_up() -> None:
    size = plots(planted_report())[2]
    drawn = scatter(size, 540, 340)
    marks = [tuple(map(float, pair)) for pair in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    by_speed = sorted(zip((point.x for point in size.points), marks, strict=True))
    assert [x for _, (x, _) in by_speed] == sorted(x for x, _ in marks)
    by_size = sorted(zip((point.y for point in size.points), marks, strict=True))
    assert [y for _, (_, y) in by_size] == sorted((y for _, y in marks), reverse=True)


def test_labels_of_crowded_marks_do_not_overlap() -> None:
    labels = ["openvino-bf16"] * 6
    marks = [(200.0 + 3 * index, 100.0) for index in range(6)]
    spots = place_labels(labels, marks, (0, 0, 540, 340))
    boxes = [(x, y - 11, x + 6.4 * 13, y + 3) for x, y in spots]
    for index, first in enumerate(boxes):
        for second in boxes[index + 1 :]:
            apart = first[2] <= second[0] or second[2] <= first[0] or first[3] <= second[1] or second[3] <= first[1]
            assert apart
        assert first[0] >= 0
        assert first[2] <= 540


def test_labels_are_escaped() -> None:
    size = plots(planted_report())[0]
    hostile = dataclasses.replace(size, points=(dataclasses.replace(size.points[0], label="<script>"), size.points[1]))
    assert "<script>" not in scatter(hostile, 540, 340)
