"""Bars, ticks and scatter plots: positions follow the figures, labels keep out of each other's way."""

from __future__ import annotations

import re

import pytest
from planted_report import planted_report

from sdkd.compare.charts import latency_bars, nice_ceiling, place_labels, plots, scatter, tick


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
    groups, ticks = latency_bars(report)
    assert [(group.model, group.colour) for group in groups] == [("teacher", 0), ("small", 1), ("tiny", 2)]
    assert groups[2].about == "student, 1.2 M UNet parameters"
    assert ticks[0] == (0.0, "0")
    assert ticks[-1] == (100.0, "40")
    for group in groups:
        for bar in group.bars:
            step = report.result(bar.label).unet_step_ms
            assert bar.width == pytest.approx(step.median / 40 * 100)
            assert bar.low <= bar.width <= bar.high <= 100
            assert len(bar.samples) <= step.count
    eager = groups[0].bars[0]
    assert (eager.target, eager.eager, eager.note) == ("eager", True, "")
    assert groups[2].bars[3].note == "6.80×"


def test_one_mark_and_one_label_per_subject() -> None:
    size, captions = plots(planted_report())
    for plot in (size, captions):
        drawn = scatter(plot, 540, 340)
        assert drawn.count("<circle") == len(plot.points) == 12
        assert drawn.count('class="name"') == 12
        assert drawn.count("<polyline") == 3
    assert size.y_range == (0.0, 20.0)
    assert captions.y_range[1] == 1.0
    assert [plot.title for plot in plots(planted_report(judged=False))] == ["Speed and size"]


def test_faster_is_further_right_and_larger_is_further_up() -> None:
    size = plots(planted_report())[0]
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
    import dataclasses

    size = plots(planted_report())[0]
    hostile = dataclasses.replace(size, points=(dataclasses.replace(size.points[0], label="<script>"), size.points[1]))
    assert "<script>" not in scatter(hostile, 540, 340)
