"""The columns, the Markdown table and the terminal table."""

from __future__ import annotations

import dataclasses

import pytest
from planted_report import planted_report, printed

from sdkd.compare.measure.stats import Ratio, Spread
from sdkd.compare.report.columns import COLUMNS, best_rows, number, shown_columns, similarity
from sdkd.compare.report.files import html_page
from sdkd.compare.report.tables import markdown, terminal_table
from sdkd.compare.report.words import findings, listing, plural, sentence

BY_KEY = {column.key: column for column in COLUMNS}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.5, "1,234"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.4, "0.400"), (0.0123, "0.012")],
)
def test_numbers_have_three_digits_and_no_exponent(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("ratio", "text", "note", "tone"),
    [
        (Ratio(1.9, 1.85, 1.95), "1.90×", "1.85–1.95", "good"),
        (Ratio(1.01, 0.98, 1.03), "tie", "0.98–1.03", "muted"),
        (Ratio(0.8, 0.7, 0.9), "0.80×", "0.70–0.90", "bad"),
    ],
)
def test_a_ratio_is_a_factor_with_its_interval_or_a_tie(ratio: Ratio, text: str, note: str, tone: str) -> None:
    row = dataclasses.replace(planted_report().result("tiny openvino"), step_speedup={"eager": ratio})
    cell = BY_KEY["eager"].cell(row)
    assert (cell.text, cell.note, cell.tone) == (text, note, tone)


def test_a_verdict_on_a_half_engine_names_what_it_is_measured_by() -> None:
    report = planted_report(wrong="small openvino-bf16")
    texts = {row.subject.label: BY_KEY["verdict"].cell(row).text for row in report.results}
    assert texts["small eager"] == "–"
    assert texts["small onnxruntime"] == "✓ same images"
    assert texts["small openvino-bf16"] == "✗ further than eager bf16"
    assert texts["tiny openvino-bf16"] == "✓ as close as eager bf16"


def test_columns_are_shown_where_they_have_a_value() -> None:
    report = planted_report(models=("teacher",))
    many = dataclasses.replace(report.results[0], unet_step_ms=Spread.of([[float(n)] for n in range(101)]))
    of_many = dataclasses.replace(report, results=(many, *report.results[1:]))
    keys = {
        name: {column.key for column in shown_columns(shown, page=page)}
        for name, shown, page in (
            ("page", planted_report(judged=False), True), ("table", report, False), ("many", of_many, False),
        )
    }  # fmt: skip
    assert {"eager", "teacher", "psnr", "agreement", "memory"} <= keys["page"]
    assert not keys["page"] & {"judged", "baseline", "lpips", "agreement-lpips", "clip"}  # no weights, no column
    assert not keys["table"] & {"memory", "p99"}
    assert keys["many"] - keys["table"] == {"p99"}  # 100 calls
    assert BY_KEY["p99"].cell(many).text == "99.0"


def test_values_of_cells() -> None:
    report = planted_report()
    row = report.result("tiny openvino")
    assert BY_KEY["cpu"].cell(row).sort == pytest.approx(1.9 * row.unet_step_ms.median)
    parts = row.unet_step_ms.median * 25 + 3.1 + 12.05
    assert BY_KEY["rest"].cell(row).sort == row.rest_ms == pytest.approx(1000 * row.image_s.median - parts)
    two = dataclasses.replace(row, images_per_call=2)
    assert two.rest_ms == pytest.approx(2000 * row.image_s.median - parts)
    assert row.limit is not None
    limit = BY_KEY["limit"].cell(row)
    assert (limit.text, limit.note) == (f"{row.limit.fraction:.0%}", f"{number(row.limit.flops_per_s / 1e9)} GFLOP/s")
    assert BY_KEY["limit"].cell(dataclasses.replace(row, limit=None)).text == "–"
    texts = {key: BY_KEY[key].cell(row).text for key in ("ssim", "agreement-ssim")}
    assert float(texts["agreement-ssim"]) < 0.7 < 0.99 < float(texts["ssim"])
    assert BY_KEY["agreement-ssim"].cell(report.result("teacher openvino")).text == "–"
    assert row.against_eager is not None
    images = tuple(dataclasses.replace(image, lpips=0.01 * n) for n, image in enumerate(row.against_eager.per_image))
    likeness = dataclasses.replace(row.against_eager, per_image=images)
    scored = dataclasses.replace(row, against_eager=likeness, clip_scores=(20.0, 25.0))
    assert (BY_KEY["lpips"].cell(scored).text, BY_KEY["lpips"].cell(scored).note) == ("0.010", "worst 0.020")
    assert BY_KEY["clip"].cell(scored).text == "22.5"
    assert [similarity(value) for value in (1.0, 0.99999, 0.98765)] == ["1.000", "> 0.999", "0.988"]
    judged = BY_KEY["judged"].cell(row)
    assert (judged.text, judged.note) == ("97%", "shape 90%")


def test_the_best_of_a_column() -> None:
    rows = planted_report().results
    assert best_rows(BY_KEY["step"], rows) == {"tiny openvino-bf16"}
    assert best_rows(BY_KEY["images"], rows) == {"tiny openvino-bf16"}
    assert best_rows(BY_KEY["unet"], rows) == {row.subject.label for row in rows if row.subject.model_label == "tiny"}
    assert best_rows(BY_KEY["vae"], rows) == set()  # all equal
    assert best_rows(BY_KEY["verdict"], rows) == set()  # nothing to win


def test_the_markdown_table_has_a_row_per_subject_and_the_command() -> None:
    lines = markdown(planted_report()).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 * (2 + 12)
    assert [len({line.count("|") for line in part}) for part in (table[:14], table[14:])] == [1, 1]
    assert table[14] == "| Subject | Text encoder, ms | UNet calls, × step | VAE, ms | Rest, ms | Peak RAM, +MB |"
    assert table[0].startswith("| Subject | UNet step, ms | CPU time, ms | vs own eager | vs teacher |")
    assert "| Of limit |" in table[0]
    assert lines[0] == (
        "# teacher, small and tiny on eager PyTorch, onnxruntime, openvino and openvino-bf16: "
        "3 prompts from the same noise, 64 × 64 px, 25 steps, guidance 4"
    )
    assert lines[0] == f"# {sentence(planted_report())}"
    assert lines[-1] == "    sdkd compare demo --targets eager,onnxruntime"
    assert (listing(["a"]), listing(["a", "b", "a"]), plural(1, "step")) == ("a", "a and b", "1 step")


def test_the_terminal_tables_fit_80_columns_and_cut_no_value() -> None:
    text = printed(terminal_table(planted_report(wrong="tiny onnxruntime")))
    assert "✗ differs" in text
    step = planted_report().result("tiny eager").unet_step_ms
    assert f"{number(step.median)} ({number(step.p10)}–{number(step.p90)})" in text


def test_mixed_runs_are_said_and_images_are_compared() -> None:
    report = planted_report(few="tiny")
    assert sentence(report).endswith("25 steps, guidance 4 (teacher and small); 4 steps, guidance 1 (tiny)")
    assert sentence(report).count("64 × 64 px") == 1
    head = next(line for line in markdown(report).splitlines() if line.startswith("| Subject"))
    assert head.startswith("| Subject | Steps | Guidance | UNet step, ms |")
    assert "| Image vs own eager | Image vs teacher |" in head
    row = report.result("tiny openvino-bf16")
    assert (BY_KEY["steps"].cell(row).text, BY_KEY["guidance"].cell(row).text) == ("4", "1")
    assert BY_KEY["image-teacher"].cell(row).sort == row.image_speedup["teacher"].value > 30
    text = printed(terminal_table(report))
    assert "guidance" in text
    assert "guidance" not in printed(terminal_table(planted_report()))
    assert findings(report)[0].text == "as fast per image: tiny openvino-bf16 over teacher eager"
    page = html_page(report)
    assert "LCMScheduler" in page
    assert "1 (one latent per image) or 2 (guidance: both halves in one call)" in page
    data = report.to_json()["results"][-1]
    assert (data["run"], data["unet_batch"]) == ({"steps": 4, "guidance_scale": 1.0, "scheduler": "LCMScheduler"}, 1)


def test_the_findings_are_what_the_report_supports() -> None:
    found = findings(planted_report())
    assert [finding.value for finding in found] == ["6.80×", "−62%", "9 of 9", "97%"]
    assert found[0].text == "as fast per UNet step: tiny openvino-bf16 over teacher eager"
    wrong = findings(planted_report(wrong="tiny onnxruntime", judged=False))
    assert [(finding.value, finding.tone) for finding in wrong[2:]] == [("8 of 9", "bad")]
