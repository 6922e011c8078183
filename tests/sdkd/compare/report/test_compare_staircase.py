"""The staircase: a series of subjects that each add one change, measured for real on the smallest models."""

from __future__ import annotations

import dataclasses
import json

import pytest
from compare_models import engine_models
from planted_report import printed

from sdkd.compare import Report, Subject, compare
from sdkd.compare.measure import cases
from sdkd.compare.report.files import html_page
from sdkd.compare.report.stairs import cells, heads, remarks, title
from sdkd.compare.report.tables import markdown, terminal_table
from sdkd.errors import InputError
from sdkd.models.generation import Generation

FEW = Generation(1, 1.0, "LCMScheduler")
LABELS = ("wrong eager", "right eager", "few eager", "few onnxruntime")


def subjects() -> list[Subject]:
    folder = engine_models()
    right, bundle = folder / "right", folder / "bundle"
    return [
        Subject(LABELS[3], right, "onnxruntime", "fp32", bundle, "student", run=FEW),  # the order is the staircase's
        Subject(LABELS[0], folder / "wrong", role="teacher"),
        Subject(LABELS[1], right, role="student"),
        Subject(LABELS[2], right, role="student", run=FEW),
    ]


def measured(**options: object) -> Report:
    usual = {"prompts": ["a red star"], "steps": 3, "runs": 3, "min_seconds": 0.0, "staircase": LABELS}
    return compare(subjects(), judge=lambda images, prompts: {"bright": 0.5}, **(usual | options))


@pytest.fixture(scope="module")
def report() -> Report:
    return measured()


def test_each_row_says_its_change_and_is_held_against_the_row_above_and_the_first(report: Report) -> None:
    first, right, few, engine = report.stairs
    assert [stair.label for stair in report.stairs] == list(LABELS) == list(report.setup.staircase)
    assert first.change == "wrong, eager, 3 steps, guidance 7.5"
    assert (right.change, few.change, engine.change) == ("right", "1 step, guidance 1", "onnxruntime")
    assert (first.over_previous, first.over_first, first.to_first) == (None, None, None)
    assert right.over_first == right.over_previous
    for above, stair in zip(report.stairs, report.stairs[1:], strict=False):
        assert stair.over_previous is not None
        assert stair.over_first is not None
        assert stair.over_previous.value == pytest.approx(above.image_s / stair.image_s)
        assert stair.over_first.value == pytest.approx(first.image_s / stair.image_s)
        assert stair.over_first.low is not None  # three rounds
        assert stair.to_first is not None
        assert stair.to_first.reference == LABELS[0]
        assert stair.vae_share > 0
    assert few.over_first is not None
    assert few.over_first.value > 1  # one unguided step instead of three guided ones
    row = report.result(LABELS[3])
    assert (engine.parameters, engine.judged, engine.ok, engine.peak_bytes) == (row.parameters, 0.5, True, None)


def test_it_is_in_every_form_of_the_report(report: Report) -> None:
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))["staircase"]
    assert [one["label"] for one in data] == list(LABELS)
    assert data[0]["over_first"] is None
    assert set(data[3]["over_first"]) == {"value", "low", "high", "tie"}
    assert data[3]["to_first"]["reference"] == LABELS[0]
    text = markdown(report)
    assert text.index(f"## {title(report)}") < text.index("|  | Change | An image, s |") < text.index("## All figures")
    assert text.index("## All figures") < text.index("| Subject |")
    shown = printed(terminal_table(report))
    assert shown.index("over") < shown.index("step")
    page = html_page(report)
    assert page.index('<h2 id="h-stairs">') < page.index('<ul class="notes"') < page.index('<h2 id="h-latency">')
    assert page.count('class="stair"') == page.count('class="stair vae"') == 2 * len(LABELS)
    assert "+ 1 step, guidance 1" in page
    assert [len(cells(report, stair)) for stair in report.stairs] == [len(heads(report))] * 4
    plain = dataclasses.replace(report, stairs=())
    assert plain.to_json()["staircase"] is None
    assert "h-stairs" not in html_page(plain)


def test_long_images_are_made_once_for_likeness_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first call that is long is the first timed one; one round has no interval, and says nothing of seeds."""
    monkeypatch.setattr(cases, "LONG_IMAGE_S", 0.0)
    once = measured(image_runs=1)
    for row in once.results:
        assert row.image_s.samples == ((pytest.approx(row.first_call_s, rel=0.5),),)
        assert row.repeatable is None
    assert [stair.over_first.low for stair in once.stairs[1:] if stair.over_first] == [None] * 3
    assert any("no interval" in text for text in remarks(once))
    assert "not repeatable" not in html_page(once)


def test_what_is_no_series_of_subjects_is_refused() -> None:
    with pytest.raises(InputError, match=r"'other' of the staircase is not among the subjects: choose of few onnx"):
        measured(staircase=["wrong eager", "other"])
    with pytest.raises(InputError, match=r"'wrong eager' is twice in the staircase"):
        measured(staircase=["wrong eager", "wrong eager"])
