"""Subjects in processes of their own: the same images, memory told apart, errors and crashes as one message each."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from compare_faults import HOG_BYTES, Fault, Faulty, die, fail, hog, leave, nap
from compare_models import engine_models

from sdkd.compare import Subject, compare
from sdkd.compare.measure.calls import UNET, Request
from sdkd.compare.measure.environment import Memory
from sdkd.compare.measure.isolation import IsolatedRunner, _how_it_ended
from sdkd.compare.measure.results import Report
from sdkd.compare.measure.runner import LocalRunner, RunConfig
from sdkd.errors import EngineError, InputError, ModelError

QUICK: dict[str, Any] = {"prompts": ["a red star", "a blue ring"], "steps": 2, "runs": 3, "min_seconds": 0.0}
REQUEST = Request(("a red star",), 2, 7.5, 0, 32)
LABELS = ("right eager", "right onnxruntime")


def subjects() -> list[Subject]:
    model, bundle = engine_models() / "right", engine_models() / "bundle"
    return [Subject(LABELS[0], model), Subject(LABELS[1], model, "onnxruntime", bundle=bundle)]


def faulty(subject: Subject, fault: Fault) -> Faulty:
    return Faulty(**vars(subject), fault=fault)


@pytest.fixture(scope="module")
def isolated() -> Report:
    """Both subjects, each in a process of its own: one sleeps in every UNet call, the other takes 300 MB."""
    eager, engine = (faulty(subject, fault) for subject, fault in zip(subjects(), (nap, hog), strict=True))
    return compare([eager, engine], isolate=True, **QUICK)


def pixels(report: Report, label: str) -> list[bytes]:
    return [image.tobytes() for image in report.images[label]]


def test_images_are_those_of_one_process_bit_for_bit(isolated: Report) -> None:
    here = compare(subjects(), **QUICK)
    assert (isolated.setup.isolated, here.setup.isolated) == (True, False)
    for label in LABELS:
        assert pixels(isolated, label) == pixels(here, label)
        one, other = isolated.result(label), here.result(label)
        assert (one.unet_parameters, one.attention, one.unet_calls) == (
            other.unet_parameters,
            other.attention,
            other.unet_calls,
        )
        assert one.repeatable
        assert other.memory.peak_rss is None  # one process has one peak
    verdict = isolated.result(LABELS[1]).verdict
    assert verdict is not None
    assert verdict.ok is True


def test_the_peak_of_memory_is_each_subjects_own(isolated: Report) -> None:
    quiet, loud = (isolated.result(label).memory for label in LABELS)
    assert quiet.peak_rss is not None
    assert loud.peak_rss is not None
    assert 0 < quiet.peak_rss < HOG_BYTES < loud.peak_rss
    assert min(quiet.base_rss, loud.base_rss) > 50_000_000  # libraries were there before
    row = isolated.to_json()["results"][1]
    assert (row["peak_rss_bytes"], row["base_rss_bytes"]) == (loud.peak_rss, loud.base_rss)
    assert (row["peak_gpu_bytes"], row["peak_torch_bytes"]) == (None, None)


def test_a_planted_delay_works_in_the_subjects_own_process(isolated: Report) -> None:
    samples = isolated.result(LABELS[0]).unet_step_ms.samples
    assert min(min(part) for part in samples) >= 50


def test_parts_have_samples_of_their_own(isolated: Report) -> None:
    for row in isolated.to_json()["results"]:
        for part in ("text_encoder_ms", "vae_decode_ms"):
            assert [len(burst) for burst in row[part]["samples"]] == [1, 1, 1]
            assert row[part]["median"] > 0
        assert row["unet_calls"] == 2
        rest = 1000 * row["image_s"]["median"] - row["text_encoder_ms"]["median"] - row["vae_decode_ms"]["median"]
        assert row["rest_ms"] == pytest.approx(rest - row["unet_calls"] * row["unet_step_ms"]["median"])


def test_a_subject_whose_process_is_ended_is_a_row_and_its_images_stay_the_reference() -> None:
    eager, engine = subjects()
    report = compare([faulty(eager, die), engine], isolate=True, **QUICK)
    assert multiprocessing.active_children() == []
    (failed,) = report.failed
    assert failed.subject.label == LABELS[0]
    assert failed.reason == (
        "the process of 'right eager' was ended by SIGKILL while it was warmed up: most likely the system ran out of "
        "memory; compare fewer subjects at once, or give a smaller --size or --batch"
    )
    row = report.result(LABELS[1])
    assert row.unet_step_ms.count >= 3
    assert (row.step_speedup, row.image_speedup) == ({}, {})
    assert row.verdict is not None
    assert row.verdict.ok is True  # all of its images were there before it died


def test_errors_of_a_process_are_the_same_errors_here(tmp_path: Path) -> None:
    gone = Subject("gone eager", tmp_path / "gone")
    with pytest.raises(ModelError, match="gone' does not exist"):
        compare([gone], isolate=True, **QUICK)
    with pytest.raises(InputError, match="'right eager': height 30 is not a multiple of"):
        compare(subjects()[:1], size=30, isolate=True, **QUICK)
    assert multiprocessing.active_children() == []


def test_a_process_goes_on_after_an_error_and_ends_when_it_is_closed() -> None:
    child = IsolatedRunner(faulty(subjects()[0], fail), RunConfig("cpu"))
    try:
        assert child.open().unet_parameters > 0
        with pytest.raises(
            EngineError, match=r"'right eager' failed while it was warmed up: ValueError: planted; --debug shows where"
        ) as caught:
            child.warm(UNET, REQUEST)
        assert "compare_faults.py" in caught.value.__notes__[0]  # where, for --debug
        assert len(child.images(REQUEST, 0).images) == 1
    finally:
        child.close()
    assert multiprocessing.active_children() == []


def test_a_process_that_leaves_by_itself_is_one_message() -> None:
    child = IsolatedRunner(faulty(subjects()[0], leave), RunConfig("cpu"))
    try:
        child.open()
        with pytest.raises(EngineError, match="process of 'right eager' was ended with status 3 while it was timed"):
            child.burst(UNET, REQUEST, 1)
    finally:
        child.close()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (-9, "by SIGKILL while it was timed: most likely the system ran out of memory; compare fewer"),
        (-11, "by SIGSEGV while it was timed: a library of its target crashed; build its engines again"),
        (7, "with status 7 while it was timed: look at what it printed above"),
        (None, "with status None while it was timed: look at what it printed above"),
    ],
)
def test_how_a_process_ended_in_words(status: int | None, words: str) -> None:
    assert _how_it_ended(status, "it was timed").startswith(words)


def test_peaks_of_two_processes_of_one_subject_are_the_larger_ones() -> None:
    first, second = Memory(10, 5, 100, None, 7), Memory(12, 6, 90, 50, None)
    assert first.with_peaks_of(second) == Memory(10, 5, 100, 50, 7)


def test_a_scheduler_may_call_the_unet_more_often_than_it_is_asked_for_steps() -> None:
    runner = LocalRunner(subjects()[0], RunConfig("cpu", scheduler="heun", size=(32, 32)))
    opened = runner.open()
    assert (opened.size, opened.scheduler, opened.device) == ((32, 32), "HeunDiscreteScheduler", "cpu")
    assert runner.images(REQUEST, 0).unet_calls == 2 * REQUEST.steps - 1
    runner.close()
