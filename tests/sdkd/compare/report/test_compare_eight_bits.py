"""Engines in eight bits in a report: verdicts of their own, and the errors by timestep, in every form."""

from __future__ import annotations

import dataclasses
import json

import pytest
from planted_report import planted_report, printed
from quantized_records import FLAGS

from sdkd.bundle.quantized import Quantized
from sdkd.compare.measure.quality import Verdict
from sdkd.compare.measure.results import Report
from sdkd.compare.report import eight_bits
from sdkd.compare.report.columns import COLUMNS
from sdkd.compare.report.files import html_page
from sdkd.compare.report.tables import markdown, terminal_table
from sdkd.compare.report.words import findings
from sdkd.errors import ParityError

LABEL = "tiny openvino-int8"
VERDICT = next(column for column in COLUMNS if column.key == "verdict")


@pytest.fixture(scope="module")
def report() -> Report:
    return planted_report(models=("teacher", "tiny"), eight_bits=True)


def with_rounding(report: Report, quality: dict[str, object], verdict: Verdict | None = None) -> Report:
    """The report with another record of the engines in eight bits."""
    record = Quantized.of({**FLAGS, "quality": quality})
    rows = [
        dataclasses.replace(row, rounding=record, verdict=verdict or row.verdict) if row.rounding else row
        for row in report.results
    ]
    return dataclasses.replace(report, results=tuple(rows))


def test_further_than_half_precision_is_a_verdict_that_breaks_no_rule(report: Report) -> None:
    row = report.result(LABEL)
    assert row.verdict is not None
    assert (row.verdict.ok, row.verdict.further) == (None, True)
    cell = VERDICT.cell(row)
    assert (cell.text, cell.tone) == ("further than eager bf16", "muted")
    assert cell.note == row.verdict.found.removeprefix("further: ")
    assert report.ok
    report.check()
    assert f"{LABEL} further" in next(one.note for one in findings(report) if "engines make" in one.text)


def test_an_engine_that_its_own_build_refused_fails_the_comparison(report: Report) -> None:
    refused = Verdict(False, "the rule", "further: 29.0 dB, bf16 34.0 dB, and its build did not find it good enough")
    broken = with_rounding(report, FLAGS["quality"], refused)
    assert VERDICT.cell(broken.result(LABEL)).text == "✗ further than eager bf16"
    again = "Use the bf16 engine, or calibrate with more images and build again: sdkd .* --target openvino-int8"
    with pytest.raises(ParityError, match=again):
        broken.check()


def test_errors_by_timestep_are_in_every_form(report: Report) -> None:
    text = markdown(report)
    assert "| Timestep | teacher openvino-int8 | tiny openvino-int8 |" in text
    assert "| 981 | 3.4 % | 3.4 % |" in text
    assert "| 21 | 1.1 % | 1.1 % |" in text
    assert "weights in 7 bits per output channel" in text
    page = html_page(report)
    assert page.index('<section aria-labelledby="h-eight-bits">') < page.index('<section aria-labelledby="h-memory">')
    assert page.count(">3.4 %</td>") == 2
    shown = " ".join(printed(terminal_table(report)).split())
    assert f"{LABEL}: {report.result(LABEL).verdict.found}. As it was built: activations in 8 bits" in shown
    assert "21 layers rounded, 3 in float; prediction at most 3.4 % from the float one (limit 10 %)" in shown
    assert "1.42× as fast as fp32" in shown
    row = next(row for row in report.to_json()["results"] if row["label"] == LABEL)
    assert json.loads(json.dumps(row["rounding"]["quality"])) == FLAGS["quality"]
    assert row["rounding"]["speed"]["times"] == 1.42
    assert row["verdict"]["further"] is True


def test_errors_that_were_only_simulated_and_those_over_the_limit_are_told(report: Report) -> None:
    quality = {**FLAGS["quality"], "engine": None, "limit": 0.02}
    changed = with_rounding(report, quality)
    assert eight_bits.heads(changed)[1:] == [
        ("teacher openvino-int8", "rounded in PyTorch"),
        (LABEL, "rounded in PyTorch"),
    ]
    assert [(step, [(cell.text, cell.tone) for cell in cells]) for step, cells in eight_bits.rows(changed)] == [
        ("981", [("3.1 %", "bad")] * 2),
        ("21", [("1.2 %", "")] * 2),
    ]


def test_a_report_without_them_does_not_mention_them() -> None:
    plain = planted_report(models=("teacher", "tiny"))
    for text in (markdown(plain), html_page(plain), json.dumps(plain.to_json())):
        assert "eight bits" not in text
        assert "rounding" not in text
        assert 'further"' not in text
