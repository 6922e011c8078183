"""Limits and scores that a finished comparison is completed with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from compare_models import engine_models
from planted_report import planted_report
from small_clip import save_small_clip

import sdkd.compare.measure.beside as beside
from sdkd.compare.measure import scores
from sdkd.compare.measure.limits import unet_work
from sdkd.compare.measure.results import Report
from sdkd.compare.measure.subjects import Subject
from sdkd.models.resolve import resolve


def one(subject: Subject) -> Report:
    """A planted report of the teacher in eager, as if it were of this subject."""
    report = planted_report(models=("teacher",))
    row = dataclasses.replace(report.results[0], subject=subject, work=None, limit=None)
    images = {subject.label: report.images["teacher eager"]}
    return dataclasses.replace(report, results=(row,), images=images, ceilings={})


def test_a_report_gets_the_limit_of_each_call() -> None:
    report = one(Subject("demo eager", "demo"))
    found = beside.with_limits(report, "cpu")
    row, ceilings = found.results[0], found.ceilings["fp32"]
    side = report.setup.size_px // resolve("demo").latent_scale
    assert row.work == unet_work(resolve("demo").unet_config, report.setup.unet_batch, side, side)
    assert row.limit is not None
    assert row.work is not None
    assert row.limit.flops_per_s == pytest.approx(row.work.flops / (row.unet_step_ms.median / 1000))
    assert row.limit.matrix_share == pytest.approx(row.limit.flops_per_s / ceilings.flops_per_s)
    data = found.to_json()
    assert data["ceilings"]["fp32"] == vars(ceilings)
    assert data["results"][0]["limit"] == {**vars(row.work), **vars(row.limit)}
    assert report.to_json()["results"][0]["limit"] is None


def test_a_model_that_is_gone_has_no_limit_and_a_note(tmp_path: Path) -> None:
    found = beside.with_limits(one(Subject("gone eager", tmp_path / "gone")), "cpu")
    assert found.results[0].limit is None
    assert found.notes[-1].startswith("gone eager: its limit is not known (model '")


def test_what_was_timed_is_not_lost_when_a_ceiling_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: str, precision: str) -> None:
        raise RuntimeError("CUDA out of memory.\nTried to allocate 1 GiB")

    monkeypatch.setattr(beside, "measure_ceilings", fail)
    found = beside.with_limits(one(Subject("demo eager", "demo")), "cpu")
    assert found.results[0].limit is None
    assert found.ceilings == {}
    assert found.notes[-1] == "fp32: the machine's limit could not be measured (CUDA out of memory.)"


def test_work_is_read_from_configs_alone() -> None:
    setup = dataclasses.replace(planted_report().setup, size_px=512, unet_batch=1)
    work = beside.subject_work(Subject("x", "random:sd15-tiny", precision="bf16"), setup)
    assert work.flops / 2e9 == pytest.approx(242.8, abs=0.05)
    bundle = engine_models() / "bundle"
    eager = beside.subject_work(Subject("x", engine_models() / "right"), setup)
    assert beside.subject_work(Subject("x", "gone", "onnxruntime", bundle=bundle), setup) == eager


def test_what_needs_weights_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(folder: object, model: str) -> Path:
        raise scores.NotMeasuredError(f"the weights of {model} are not on this disk")

    monkeypatch.setattr(scores, "find_clip", none)
    found = beside.complete(one(Subject("demo eager", "demo")), "cpu")
    assert found.results[0].clip_scores is None
    assert found.not_measured[-1] == f"CLIP score: the weights of {scores.CLIP_SCORE_MODEL} are not on this disk"
    assert found.to_json()["not_measured"] == list(found.not_measured)
    assert beside._named("LPIPS", "LPIPS needs a package") == "LPIPS needs a package"


def test_clip_scores_come_from_weights_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_small_clip(tmp_path)
    monkeypatch.setattr(scores, "find_clip", lambda asked, model: folder)
    report = planted_report(models=("teacher",))
    found = beside.with_clip_scores(report, "cpu")
    assert found.not_measured == ()
    row = found.results[0]
    model, processor = scores.load_clip(folder)
    assert row.clip_scores is not None
    expected = scores.clip_scores(model, processor, report.images[row.subject.label], report.setup.image_prompts)
    assert list(row.clip_scores) == expected
    assert row.clip_mean == pytest.approx(sum(expected) / len(expected))
    assert found.to_json()["results"][0]["clip_scores"] == {"mean": row.clip_mean, "per_image": expected}
