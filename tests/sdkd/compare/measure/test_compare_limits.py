"""The work of a UNet call, the measured ceilings, the limit that a call reaches; and scores that need weights."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from compare_models import engine_models
from planted_report import planted_report
from small_clip import save_small_clip

import sdkd.compare.measure.comparison as comparison
import sdkd.compare.measure.limits as limits
from sdkd.compare.measure import scores
from sdkd.compare.measure.comparison import subject_work, with_limits, with_scores
from sdkd.compare.measure.limits import (
    Ceilings,
    Work,
    _convolution_rate,
    _copy_rate,
    _fastest_call,
    _fastest_product,
    element_bytes,
    fraction,
    measure_ceilings,
    unet_work,
)
from sdkd.compare.measure.results import Report
from sdkd.compare.measure.subjects import Subject
from sdkd.compare.measure.timing import Timer
from sdkd.errors import InputError
from sdkd.families import MODELS
from sdkd.models.resolve import resolve
from sdkd.students.blocks import student_config

SD15 = MODELS["sd15"][1].unet


# Multiply-adds of one latent of 64 x 64 with the products of attention, and parameters, of Stable Diffusion 1.5.
@pytest.mark.parametrize(
    ("config", "giga_macs", "parameters"),
    [(SD15, 401.6, 859_520_964), (student_config(SD15, "tiny"), 242.8, 323_384_964)],
    ids=["teacher", "tiny"],
)
def test_work_of_stable_diffusion(config: dict[str, Any], giga_macs: float, parameters: int) -> None:
    work = unet_work(config, 1, 64, 64, element_bytes=2)
    assert work.flops / 2e9 == pytest.approx(giga_macs, abs=0.05)
    assert work.bytes == 2 * (parameters + 2 * 4 * 64 * 64 + 77 * 768)


def test_work_grows_with_the_batch_and_weights_are_read_once() -> None:
    config = helpers.TEACHER_UNET
    one, two = unet_work(config, 1, 8, 8), unet_work(config, 2, 8, 8)
    assert two.flops == 2 * one.flops
    assert one.bytes < two.bytes < 2 * one.bytes
    assert unet_work(config, 1, 8, 8, sequence=20).flops < one.flops
    assert 2 * unet_work(config, 1, 8, 8, element_bytes=2).bytes == one.bytes


def test_a_call_against_the_ceilings() -> None:
    ceilings = Ceilings(flops_per_s=100.0, bytes_per_s=10.0, how="planted")
    compute = fraction(Work(flops=1000, bytes=20), ceilings, seconds=20.0)
    assert (compute.bound, compute.least_s, compute.fraction) == ("compute", 10.0, 0.5)
    assert (compute.flops_per_s, compute.matrix_share) == (50.0, 0.5)
    memory = fraction(Work(flops=100, bytes=200), ceilings, seconds=80.0)
    assert (memory.bound, memory.least_s, memory.fraction) == ("memory", 20.0, 0.25)
    assert memory.matrix_share == pytest.approx(0.0125)
    with pytest.raises(InputError, match=r"a call of 0.0 s has no rate: give the measured time, above 0"):
        fraction(Work(1, 1), ceilings, 0.0)


def test_ceilings_are_measured_and_said() -> None:
    found = measure_ceilings("cpu", "fp32")
    assert found.flops_per_s > 1e7
    assert found.bytes_per_s > 1e6
    how = (
        r"(product of \d+ × \d+ matrices|3 × 3 convolution of 4 channels, 8 × 8,) in float32; copy of 1 MiB, {} threads"
    )
    assert re.fullmatch(how.format(torch.get_num_threads()), found.how)
    with pytest.raises(InputError, match="precision 'int4' is unknown"):
        measure_ceilings("cpu", "int4")
    assert [element_bytes(name) for name in ("fp32", "fp16", "bf16")] == [4, 2, 2]


def test_a_convolution_counts_where_the_products_are_not_too_slow_for_it() -> None:
    ticks = itertools.count(0.0, 0.25)
    timer = Timer("cpu", clock=lambda: next(ticks), cpu_clock=lambda: 0.0)  # every call takes 0.25 s
    flops = 2 * 9 * 2 * 4 * 4 * 8 * 8  # multiply-adds of 2 images of 8 x 8 with 4 channels in and out, 3 x 3, doubled
    assert _convolution_rate(timer, torch.float32, 1e9) == flops / 0.25
    assert _convolution_rate(timer, torch.float32, flops / 0.6) == 0.0


def test_slow_calls_are_few() -> None:
    ticks = itertools.count(0.0, 1.0)
    timer = Timer("cpu", clock=lambda: next(ticks), cpu_clock=lambda: 0.0)  # every call takes 1 s
    assert _fastest_call(timer, lambda: None, 0.5) == (1.0, 3.0)
    assert _fastest_call(timer, lambda: None, 4.0) == (1.0, 4.0)
    assert _fastest_call(timer, lambda: None, 60.0) == (1.0, 10.0)


def slow_at_first(first_s: float, then_s: float) -> Timer:
    """A timer whose first call takes as long as a library that starts up, all others as long as the work."""
    gaps = itertools.chain([0.0, first_s], itertools.cycle([0.0, then_s]))
    ticks = itertools.accumulate(gaps)
    return Timer("cpu", clock=lambda: next(ticks), cpu_clock=lambda: 0.0)


@pytest.mark.parametrize("first_s", [0.01, 0.26, 30.0])
def test_a_library_that_starts_up_changes_no_ceiling(monkeypatch: pytest.MonkeyPatch, first_s: float) -> None:
    monkeypatch.setattr(limits, "BUDGET_S", 1.0)
    side, rate = _fastest_product(slow_at_first(first_s, 0.01), (8, 16, 32), torch.float32)
    assert (side, rate) == (32, pytest.approx(2 * 32**3 / 0.01))
    assert _copy_rate(slow_at_first(first_s, 0.01), 4096) == pytest.approx(2 * 4096 / 0.01)


def test_what_is_copied_is_random(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[torch.Tensor] = []
    original = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, source: copied.append(source) or original(to, source))
    _copy_rate(Timer("cpu"), 4096)
    assert len(copied) >= 5
    assert copied[0].numel() == 1024
    assert copied[0].unique().numel() > 1000


def one(subject: Subject) -> Report:
    """A planted report of the teacher in eager, as if it were of this subject."""
    report = planted_report(models=("teacher",))
    row = dataclasses.replace(report.results[0], subject=subject, work=None, limit=None)
    images = {subject.label: report.images["teacher eager"]}
    return dataclasses.replace(report, results=(row,), images=images, ceilings={})


def test_a_report_gets_the_limit_of_each_call() -> None:
    report = one(Subject("demo eager", "demo"))
    found = with_limits(report, "cpu")
    row, ceilings = found.results[0], found.ceilings["fp32"]
    side = report.setup.size_px // resolve("demo").latent_scale
    assert row.work == unet_work(resolve("demo").unet_config, row.unet_batch, side, side)
    assert row.limit is not None
    assert row.work is not None
    assert row.limit.flops_per_s == pytest.approx(row.work.flops / (row.unet_step_ms.median / 1000))
    assert row.limit.matrix_share == pytest.approx(row.limit.flops_per_s / ceilings.flops_per_s)
    data = found.to_json()
    assert data["ceilings"]["fp32"] == vars(ceilings)
    assert data["results"][0]["limit"] == {**vars(row.work), **vars(row.limit)}
    assert report.to_json()["results"][0]["limit"] is None


def test_what_was_timed_is_not_lost_where_a_limit_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = with_limits(one(Subject("gone eager", tmp_path / "gone")), "cpu")
    assert found.results[0].limit is None
    assert found.notes[-1].startswith("gone eager: its limit is not known (model '")

    def fail(device: str, precision: str) -> None:
        raise RuntimeError("CUDA out of memory.\nTried to allocate 1 GiB")

    monkeypatch.setattr(comparison, "measure_ceilings", fail)
    found = with_limits(one(Subject("demo eager", "demo")), "cpu")
    assert (found.results[0].limit, found.ceilings) == (None, {})
    assert found.notes[-1] == "fp32: the machine's limit could not be measured (CUDA out of memory.)"


def test_work_is_read_from_configs_alone() -> None:
    setup = dataclasses.replace(planted_report().setup, size_px=512)
    work = subject_work(Subject("x", "random:sd15-tiny", precision="bf16"), setup, 1)
    assert work.flops / 2e9 == pytest.approx(242.8, abs=0.05)
    bundle = engine_models() / "bundle"
    eager = subject_work(Subject("x", engine_models() / "right"), setup, 1)
    assert subject_work(Subject("x", "gone", "onnxruntime", bundle=bundle), setup, 1) == eager


def test_what_needs_weights_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(folder: object, model: str) -> Path:
        raise scores.NotMeasuredError(f"the weights of {model} are not on this disk")

    monkeypatch.setattr(scores, "find_clip", none)
    found = with_scores(one(Subject("demo eager", "demo")), "cpu")
    assert found.results[0].clip_scores is None
    assert found.not_measured[-1] == f"CLIP score: the weights of {scores.CLIP_SCORE_MODEL} are not on this disk"
    assert found.to_json()["not_measured"] == list(found.not_measured)


def test_clip_scores_come_from_weights_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_small_clip(tmp_path)
    monkeypatch.setattr(scores, "find_clip", lambda asked, model: folder)
    report = planted_report(models=("teacher",))
    found = with_scores(report, "cpu")
    assert not any(why.startswith("CLIP score") for why in found.not_measured)
    row = found.results[0]
    model, processor = scores.load_clip(folder)
    assert row.clip_scores is not None
    expected = scores.clip_scores(model, processor, report.images[row.subject.label], report.setup.image_prompts)
    assert list(row.clip_scores) == expected
    assert row.clip_mean == pytest.approx(sum(expected) / len(expected))
    assert found.to_json()["results"][0]["clip_scores"] == {"mean": row.clip_mean, "per_image": expected}


def test_gpu_ceilings_leave_the_settings_as_they_were() -> None:
    before = torch.get_float32_matmul_precision()
    full, half = measure_ceilings("cuda", "fp32"), measure_ceilings("cuda", "fp16")
    assert half.flops_per_s > 0.5 * full.flops_per_s
    assert full.bytes_per_s > 1e9
    assert "TF32 allowed" in full.how
    assert torch.get_float32_matmul_precision() == before
