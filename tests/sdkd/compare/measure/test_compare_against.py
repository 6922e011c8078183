"""A report against an earlier one: planted slowdowns, images that became wrong, other settings, other machines."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from planted_report import planted_report, printed, rounds
from typer.testing import CliRunner, Result

from sdkd import cli
from sdkd.compare.measure.against import Against, Change, check_common, compare_files, weigh
from sdkd.compare.measure.earlier import parse_report, read_report
from sdkd.compare.report.files import html_page, write_report
from sdkd.compare.report.tables import against_remarks, against_table, markdown
from sdkd.core.console import no_html
from sdkd.errors import InputError, ParityError, RegressionError

SUBJECT = "tiny onnxruntime"


@pytest.fixture(scope="module")
def base() -> dict[str, Any]:
    """The planted report as JSON, three of its subjects."""
    data = dict(json.loads(json.dumps(planted_report(models=("teacher", "tiny")).to_json())))
    data["results"] = [row(data, label) for label in ("teacher eager", "tiny eager", SUBJECT)]
    return data


def row(data: dict[str, Any], label: str = SUBJECT) -> dict[str, Any]:
    return next(result for result in data["results"] if result["label"] == label)


def changed(data: dict[str, Any], seed: int = 50, slower: float = 1.0, **changes: Any) -> dict[str, Any]:
    """The report measured again: SUBJECT's samples drawn anew and `slower` times as long, its fields changed."""
    again = copy.deepcopy(data)
    found = row(again)
    median = 13.2 / 1.6 * slower
    found["unet_step_ms"] = {**found["unet_step_ms"], "samples": rounds(median, seed), "median": median}
    found.update(changes)
    return again


def against(then: dict[str, Any], now: dict[str, Any], threshold: float = 0.1) -> Against:
    return weigh(parse_report(then, "old.json"), parse_report(now, "new.json"), threshold)


def change(found: Against, label: str = SUBJECT) -> Change:
    return next(one for one in found.changes if one.label == label)


@pytest.mark.parametrize("seed", range(50, 53))
def test_a_planted_20_percent_is_slower_and_named(base: dict[str, Any], seed: int) -> None:
    slow = changed(base, seed, 1.2)
    found = against(base, slow)
    one = change(found)
    assert one.verdict == "slower"
    assert one.slower_by == pytest.approx(0.2, abs=0.03)
    assert one.speed is not None
    assert one.speed.high < 1
    assert [each.label for each in found.worse] == [SUBJECT]
    with pytest.raises(RegressionError, match=r"1 of 3 subjects is worse than in 'old.json' of 2026-01-02. "
                       r"'tiny onnxruntime': a UNet step takes \d\d% longer .* and 10% is allowed"):  # fmt: skip
        raise found.problem() or AssertionError
    allowed = against(base, slow, threshold=0.3)
    assert (change(allowed).verdict, allowed.problem()) == ("slower", None)
    fast = against(slow, base)
    assert (change(fast).verdict, fast.problem()) == ("faster", None)


def test_a_report_against_itself_is_all_ties(base: dict[str, Any]) -> None:
    found = against(base, base)
    assert {one.verdict for one in found.changes} == {"tie"}
    assert {one.speed.value for one in found.changes if one.speed} == {1.0}
    assert {one.psnr_change_db for one in found.changes} == {0.0, None}
    assert change(found, "tiny eager").images == "not compared"  # it is the measure itself
    assert (found.problem(), found.appeared, found.went, found.differences, found.notes) == (None, (), (), (), ())


def test_planted_nothing_is_a_tie_in_nearly_all_measurements(base: dict[str, Any]) -> None:
    found = [against(base, changed(base, seed)) for seed in range(60, 72)]
    assert sum(change(each).verdict == "tie" for each in found) >= 10  # 95 % by construction
    assert all(each.problem() is None for each in found)


def test_images_that_became_wrong_are_an_error_and_other_changes_are_said(base: dict[str, Any]) -> None:
    old = row(base)["against_eager"]
    worse = changed(
        base,
        against_eager={**old, "psnr_mean_db": old["psnr_mean_db"] - 30},
        verdict={"ok": False, "rule": "40 dB", "found": "worst image 20.0 dB"},
    )
    found = against(base, worse)
    assert (change(found).images, change(found).psnr_change_db) == ("worse", pytest.approx(-30))
    with pytest.raises(RegressionError, match=r"'tiny onnxruntime': its images broke their rule, .*image 20.0 dB"):
        raise found.problem() or AssertionError
    assert change(against(worse, base)).images == "better"
    assert against(worse, worse).problem() is None  # no worse than then
    for moved, images in ((-0.9, "same"), (1.1, "changed"), (-1.1, "changed")):
        other = changed(base, against_eager={**old, "psnr_mean_db": old["psnr_mean_db"] + moved})
        assert change(against(base, other)).images == images
        assert against(base, other).problem() is None
    same = changed(base, against_eager={**old, "identical": True, "psnr_mean_db": None, "psnr_min_db": None})
    assert change(against(base, same)).psnr_change_db == pytest.approx(100 - old["psnr_mean_db"])  # counts 100 dB


def test_subjects_that_appeared_or_went(base: dict[str, Any]) -> None:
    fewer = base | {"results": [result for result in base["results"] if result["label"] != SUBJECT]}
    assert against(base, fewer).went == against(fewer, base).appeared == (SUBJECT,)
    assert against(fewer, base).problem() is None
    none = against(base, base | {"results": []})
    with pytest.raises(InputError, match=r"no speed can be compared with 'old.json': all that it has failed now"):
        raise none.problem() or AssertionError


@pytest.mark.parametrize(
    ("part", "key", "value", "words", "speed", "images"),
    [
        ("setup", "prompts", ["a dog"], "prompts: 3 then, 1 now, not the same", True, False),
        ("setup", "size_px", 128, "image side in pixels: 64 then, 128 now", False, False),
        ("setup", "batch", 4, "images per call: 1 then, 4 now", False, False),
        ("environment", "cpu", "Other", "CPU: Example CPU @ 2.10GHz then, Other now", False, True),
        ("environment", "gpu", {"gpu": "H100"}, "GPU: none then, H100 now", False, True),
    ],
)
def test_a_difference_is_said_and_stops_what_hangs_on_it(
    base: dict[str, Any], part: str, key: str, value: object, words: str, speed: bool, images: bool
) -> None:
    found = against(base, base | {part: base[part] | {key: value}})
    assert found.differences == (words,)
    assert (change(found).speed is not None, change(found).images != "not compared") == (speed, images)
    assert (found.problem() is None) is speed
    if not speed:
        with pytest.raises(InputError, match=r"no speed can be compared with 'old.json': .* now. Measure both"):
            raise found.problem() or AssertionError


@pytest.mark.parametrize(
    ("key", "value", "words", "speed"),
    [
        ("steps", 4, "steps: 25 then, 4 now", True),
        ("scheduler", "LCMScheduler", "scheduler: PNDMScheduler then, LCMScheduler now", True),
        ("guidance_scale", 5.0, "guidance scale: 4.0 then, 5.0 now", True),
        ("unet_batch", 1, "latents per UNet call: 2 then, 1 now", False),
    ],
)
def test_how_a_subject_is_run_decides_what_of_it_is_compared(
    base: dict[str, Any], key: str, value: object, words: str, speed: bool
) -> None:
    other = changed(base, **({key: value} if key == "unet_batch" else {"run": row(base)["run"] | {key: value}}))
    found = against(base, other)
    assert found.differences == (f"{words} ({SUBJECT})",)
    assert (change(found).speed is not None, change(found).images) == (speed, "not compared")
    assert change(found).why_not == ("" if speed else words)
    assert change(found, "tiny eager").speed is not None
    every = copy.deepcopy(base)
    for each in every["results"]:
        each["run"]["steps"] = 4
    assert against(base, every).differences == ("steps: 25 then, 4 now",)


def test_a_reason_names_all_that_it_is_of(base: dict[str, Any]) -> None:
    other = copy.deepcopy(base)
    for found in other["results"]:
        found["unet_parameters"] = 5
    said = against_remarks(against(base, other))
    labels = [found["label"] for found in base["results"] if found["unet_parameters"] == row(base)["unet_parameters"]]
    assert f"{', '.join(labels)}: another model: 1,230,000 UNet parameters then, 5 now" in said


def test_another_model_of_the_same_label_is_not_compared_and_other_places_and_versions_are_notes(
    base: dict[str, Any],
) -> None:
    one = change(against(base, changed(base, unet_parameters=5)))
    assert (one.verdict, one.images) == ("not compared", "not compared")
    assert one.why_not == "another model: 1,230,000 UNet parameters then, 5 now"
    moved = changed(base, model="elsewhere/tiny")
    moved["environment"]["versions"]["torch"] = "3.0"
    found = against(base, moved)
    assert found.notes == ("torch 2.13.0 then, 3.0 now", "model 'models/tiny' then, 'elsewhere/tiny' now")
    assert change(found).verdict == "tie"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 9}, "report 'x' has schema 9, this sdkd reads 1, 2, 3, 4: measure again"),
        ({"results": {}}, r"report 'x' is damaged .*results is an object, not a list.*: make it again"),
        ({"results": [{"label": []}]}, r"report 'x' is damaged .*results\[0\]\.\w+ is "),
        ({"environment": {"date_utc": 3}}, r"report 'x' is damaged .*environment\.date_utc is 3, not text"),
        ({"setup": []}, r"report 'x' is damaged .*setup is a list, not an object"),
    ],
)
def test_a_report_of_another_form_names_the_key(changes: dict[str, object], message: str) -> None:
    usual = {"schema": 3, "setup": {}, "environment": {"date_utc": "2026-01-01"}, "results": []}
    with pytest.raises(InputError, match=message):
        parse_report(usual | changes, "x")


def test_reports_that_cannot_be_compared_are_refused(base: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="report 'x' is not one of `sdkd compare`"):
        parse_report({"loss": 1}, "x")
    (tmp_path / "text.json").write_text("hello")
    with pytest.raises(InputError, match=r"report '.*text.json' is not JSON"):
        read_report(tmp_path / "text.json")
    with pytest.raises(InputError, match=r"report '.*none.json' cannot be read \(No such file or directory\)"):
        read_report(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"has no subject of this comparison: it has teacher eager, .* this one other"):
        check_common(parse_report(base, "x"), ["other"])
    with pytest.raises(InputError, match="threshold -1 is too small: give a number of at least 0"):
        compare_files(tmp_path / "text.json", tmp_path / "text.json", -1)


def test_reports_of_earlier_schemas_are_read_and_their_one_process_is_noted(base: dict[str, Any]) -> None:
    first, now = copy.deepcopy(base), copy.deepcopy(base)
    now["setup"]["isolated"] = True
    for name in ("batch", "isolated", "width_px"):
        del first["setup"][name]
    first["setup"] |= {"steps": 25, "guidance_scale": 4.0, "scheduler": "PNDMScheduler", "unet_batch": 2}
    for result in first["results"]:
        for name in (
            "run",
            "unet_batch",
            "text_encoder_ms",
            "vae_decode_ms",
            "unet_calls",
            "rest_ms",
            "base_rss_bytes",
            "peak_rss_bytes",
        ):
            del result[name]
    for schema in (1, 2, 3):
        found = against(first | {"schema": schema}, now)
        assert found.differences == ()
        assert found.notes == ("all in one process then, every subject in a process of its own now",)
        assert {one.verdict for one in found.changes} == {"tie"}


def test_the_report_says_it_everywhere(base: dict[str, Any], tmp_path: Path) -> None:
    then = changed(base, slower=1 / 1.2)
    del then["results"][0]
    report = planted_report(models=("teacher", "tiny")).held_against(parse_report(then, "old.json"))
    assert report.against is not None
    words = "Against old.json of 2026-01-02: 1 tie, 1 slower"
    data = report.to_json()["against"]
    assert (data["ok"], data["threshold"], data["went"], data["day"]) == (False, 0.1, [], "2026-01-02")
    assert next(one for one in data["subjects"] if one["label"] == SUBJECT)["verdict"] == "slower"
    text = markdown(report)
    assert f"## {words}" in text
    assert "- Appeared since: teacher eager, teacher onnxruntime, " in text
    page = html_page(report)
    assert words in page
    assert "is worse than in &#39;old.json&#39;" in page
    assert "slower" in printed(against_table(report.against))
    with pytest.raises(RegressionError, match=r"'tiny onnxruntime': a UNet step takes .*See .*report.html"):
        report.check(write_report(report, tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "report.json").read_text())["against"]["ok"] is False
    wrong = planted_report(wrong=SUBJECT, models=("teacher", "tiny")).held_against(parse_report(base, "old.json"))
    with pytest.raises(ParityError, match=r"1 of 8 subjects broke a rule. .*1 of 3 subjects is worse"):
        wrong.check()


def call(*words: str) -> Result:
    return CliRunner().invoke(cli.app, ["compare", *words])


def test_two_reports_on_disk(base: dict[str, Any], tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(base))
    new.write_text(json.dumps(changed(base, slower=1.2)))
    same = call("--against", str(old), "--report", str(old))
    assert same.exit_code == 0, same.output
    assert "3 ties" in same.stdout
    slow = call("--against", str(old), "--report", str(new), "--json")
    assert slow.exit_code == 1
    assert "'tiny onnxruntime': a UNet step takes" in slow.stderr.replace("\n", " ")
    assert json.loads(slow.stdout)["ok"] is False
    assert call("--against", str(old), "--report", str(new), "--threshold", "0.5").exit_code == 0
    new.write_text(json.dumps(base | {"results": []}))
    none = call("--against", str(old), "--report", str(new))
    assert "has no subject of this comparison" in none.stderr.replace("\n", " ")


def test_bad_combinations_are_refused(tmp_path: Path) -> None:
    alone = call("--report", "new.json")
    assert alone.exit_code == 1
    assert "give --against earlier.json, no model" in alone.stderr.replace("\n", " ")
    missing = call("no-such-model", "--against", str(tmp_path / "old.json"), "--output", str(tmp_path / "out"))
    assert missing.exit_code == 1
    assert "cannot be read" in missing.stderr.replace("\n", " ")
    assert call("--threshold", "-1").exit_code == 2


def test_names_in_markdown_are_no_tags() -> None:
    assert no_html("| <img src=x onerror=y> | a > b |") == "| &lt;img src=x onerror=y> | a > b |"
