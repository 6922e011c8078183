"""The columns, the Markdown table and the terminal table."""

from __future__ import annotations

import dataclasses

import pytest
from planted_report import planted_report
from rich.console import Console

from sdkd.compare.measure.stats import Ratio, Spread
from sdkd.compare.report.cells import number
from sdkd.compare.report.tables import COLUMNS, best_rows, markdown, shown_columns, similarity, terminal_table
from sdkd.compare.report.words import findings, listing, plural, sentence

BY_KEY = {column.key: column for column in COLUMNS}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.5, "1,234"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.4, "0.400"), (0.0123, "0.012")],
)
def test_numbers_have_three_digits_and_no_exponent(value: float, text: str) -> None:
    assert number(value) == text


def test_a_ratio_is_a_factor_with_its_interval_or_a_tie() -> None:
    result = planted_report().result("tiny openvino")
    cell = BY_KEY["eager"].cell(dataclasses.replace(result, step_speedup={"eager": Ratio(1.9, 1.85, 1.95)}))
    assert (cell.text, cell.note, cell.tone) == ("1.90×", "1.85–1.95", "good")
    cell = BY_KEY["eager"].cell(dataclasses.replace(result, step_speedup={"eager": Ratio(1.01, 0.98, 1.03)}))
    assert (cell.text, cell.note, cell.tone) == ("tie", "0.98–1.03", "muted")
    cell = BY_KEY["eager"].cell(dataclasses.replace(result, step_speedup={"eager": Ratio(0.8, 0.7, 0.9)}))
    assert (cell.text, cell.tone) == ("0.80×", "bad")


def test_a_verdict_on_a_half_engine_names_what_it_is_measured_by() -> None:
    report = planted_report(wrong="small openvino-bf16")
    texts = {row.subject.label: BY_KEY["verdict"].cell(row).text for row in report.results}
    assert texts["small eager"] == "–"
    assert texts["small onnxruntime"] == "✓ same images"
    assert texts["small openvino-bf16"] == "✗ further than eager bf16"
    assert texts["tiny openvino-bf16"] == "✓ as close as eager bf16"


def test_columns_without_a_value_are_left_out() -> None:
    keys = [column.key for column in shown_columns(planted_report(judged=False), page=True)]
    assert "judged" not in keys
    assert "baseline" not in keys
    assert {"eager", "teacher", "psnr", "agreement", "memory"} <= set(keys)
    assert "memory" not in [column.key for column in shown_columns(planted_report())]


def test_p99_is_a_column_where_there_are_100_calls() -> None:
    report = planted_report(models=("teacher",))
    assert "p99" not in [column.key for column in shown_columns(report)]
    many = dataclasses.replace(report.results[0], unet_step_ms=Spread.of([[float(n)] for n in range(101)]))
    assert BY_KEY["p99"].cell(many).text == "99.0"
    assert "p99" in [c.key for c in shown_columns(dataclasses.replace(report, results=(many, *report.results[1:])))]


def test_cpu_time_stands_beside_the_wall_clock() -> None:
    result = planted_report().result("tiny openvino")
    assert BY_KEY["cpu"].cell(result).sort == pytest.approx(1.9 * result.unet_step_ms.median)


def test_the_rest_of_an_image_is_what_its_parts_leave() -> None:
    result = planted_report().result("tiny openvino")
    parts = result.unet_step_ms.median * 25 + 3.1 + 12.05
    assert result.rest_ms == pytest.approx(1000 * result.image_s.median - parts)
    assert BY_KEY["rest"].cell(result).sort == result.rest_ms
    assert dataclasses.replace(result, vae_decode_ms=None).rest_ms is None
    two = dataclasses.replace(result, images_per_call=2)
    assert two.rest_ms == pytest.approx(2000 * result.image_s.median - parts)


def test_the_limit_is_a_share_with_its_rate() -> None:
    report = planted_report()
    row = report.result("tiny openvino-bf16")
    assert row.limit is not None
    cell = BY_KEY["limit"].cell(row)
    assert (cell.text, cell.note) == (f"{row.limit.fraction:.0%}", f"{number(row.limit.flops_per_s / 1e9)} GFLOP/s")
    assert BY_KEY["limit"].cell(dataclasses.replace(row, limit=None)).text == "–"
    assert "| Of limit |" in markdown(report)


def test_scores_of_engines_and_of_students_have_columns_of_their_own() -> None:
    report = planted_report()
    texts = {key: BY_KEY[key].cell(report.result("tiny openvino")).text for key in ("ssim", "agreement-ssim")}
    assert float(texts["agreement-ssim"]) < 0.7 < 0.99 < float(texts["ssim"])
    assert BY_KEY["agreement-ssim"].cell(report.result("teacher openvino")).text == "–"
    keys = {column.key for column in shown_columns(report, page=True)}
    assert not keys & {"lpips", "agreement-lpips", "clip"}  # no weights, no column
    likeness = report.result("tiny openvino").against_eager
    assert likeness is not None
    images = tuple(dataclasses.replace(image, lpips=0.01 * n) for n, image in enumerate(likeness.per_image))
    row = dataclasses.replace(
        report.results[0], against_eager=dataclasses.replace(likeness, per_image=images), clip_scores=(20.0, 25.0)
    )
    assert (BY_KEY["lpips"].cell(row).text, BY_KEY["lpips"].cell(row).note) == ("0.010", "worst 0.020")
    assert BY_KEY["clip"].cell(row).text == "22.5"
    assert [similarity(value) for value in (1.0, 0.99999, 0.98765)] == ["1.000", "> 0.999", "0.988"]


def test_the_best_of_a_column() -> None:
    rows = planted_report().results
    assert best_rows(BY_KEY["step"], rows) == {"tiny openvino-bf16"}
    assert best_rows(BY_KEY["unet"], rows) == {
        f"tiny {name}" for name in ("eager", "onnxruntime", "openvino", "openvino-bf16")
    }
    assert best_rows(BY_KEY["vae"], rows) == set()  # all equal
    assert best_rows(BY_KEY["verdict"], rows) == set()  # nothing to win


def test_the_markdown_table_has_a_row_per_subject_and_the_command() -> None:
    report = planted_report()
    lines = markdown(report).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 * (2 + 12)
    assert [len({line.count("|") for line in part}) for part in (table[:14], table[14:])] == [1, 1]
    assert table[14] == "| Subject | Text encoder, ms | UNet calls, × step | VAE, ms | Rest, ms | Peak RAM, +MB |"
    assert table[0].startswith("| Subject | UNet step, ms | CPU time, ms | vs own eager | vs teacher |")
    assert lines[0] == f"# {sentence(report)}"
    assert lines[-1] == "    sdkd compare demo --targets eager,onnxruntime"


def test_the_terminal_tables_fit_80_columns_and_cut_no_value() -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(terminal_table(planted_report(wrong="tiny onnxruntime")))
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert "✗ differs" in text


def test_the_sentence_says_what_was_compared() -> None:
    assert sentence(planted_report()) == (
        "teacher, small and tiny on eager PyTorch, onnxruntime, openvino and openvino-bf16: "
        "3 prompts from the same noise, 64 × 64 px, 25 steps, guidance 4"
    )
    assert (listing(["a"]), listing(["a", "b", "a"]), plural(1, "step")) == ("a", "a and b", "1 step")


def test_the_findings_are_what_the_report_supports() -> None:
    found = findings(planted_report())
    assert [finding.value for finding in found] == ["6.80×", "−62%", "9 of 9", "97%"]
    assert found[0].text == "as fast per UNet step: tiny openvino-bf16 over teacher eager"
    wrong = findings(planted_report(wrong="tiny onnxruntime", judged=False))
    assert [(finding.value, finding.tone) for finding in wrong[2:]] == [("8 of 9", "bad")]
