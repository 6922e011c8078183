"""Subjects in processes of their own: the same images, memory told apart, errors and crashes as one message each."""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from compare_faults import HOG_BYTES, Fault, Faulty, die, fail, hog, leave, nap
from compare_models import engine_models

from sdkd.compare import Subject, compare
from sdkd.compare.measure.calls import UNET, Request
from sdkd.compare.measure.environment import Memory
from sdkd.compare.measure.runner import IsolatedRunner, LocalRunner, RunConfig, _how_it_ended
from sdkd.errors import EngineError, InputError, ModelError
from sdkd.models.generation import Generation

QUICK: dict[str, Any] = {"prompts": ["a red star", "a blue ring"], "steps": 2, "runs": 3, "min_seconds": 0.0}
REQUEST = Request(("a red star",), 0, 32, run=Generation(2, 7.5))
LABELS = ("right eager", "right onnxruntime")


def subjects() -> list[Subject]:
    model, bundle = engine_models() / "right", engine_models() / "bundle"
    return [Subject(LABELS[0], model), Subject(LABELS[1], model, "onnxruntime", bundle=bundle)]


def faulty(subject: Subject, fault: Fault) -> Faulty:
    return Faulty(**vars(subject), fault=fault)


def test_each_subject_has_its_own_process_and_memory_and_the_images_of_one_process() -> None:
    """One sleeps in every UNet call, the other takes 300 MB."""
    planted = [faulty(subject, fault) for subject, fault in zip(subjects(), (nap, hog), strict=True)]
    isolated, here = compare(planted, isolate=True, **QUICK), compare(subjects(), **QUICK)
    assert (isolated.setup.isolated, here.setup.isolated) == (True, False)
    for one, other in zip(isolated.results, here.results, strict=True):
        pixels = [[image.tobytes() for image in report.images[one.subject.label]] for report in (isolated, here)]
        assert pixels[0] == pixels[1]
        for name in ("unet_parameters", "attention", "unet_calls"):
            assert getattr(one, name) == getattr(other, name)
        assert one.repeatable
        assert other.memory.peak_rss is None  # one process has one peak
    quiet, loud = isolated.results
    assert loud.verdict is not None
    assert loud.verdict.ok is True
    assert min(min(part) for part in quiet.unet_step_ms.samples) >= 50  # the delay, in ms
    assert quiet.memory.peak_rss is not None
    assert loud.memory.peak_rss is not None
    assert 0 < quiet.memory.peak_rss < HOG_BYTES < loud.memory.peak_rss
    assert min(quiet.memory.base_rss, loud.memory.base_rss) > 50_000_000  # libraries were there before
    for row, memory in zip(isolated.to_json()["results"], (quiet.memory, loud.memory), strict=True):
        assert (row["peak_rss_bytes"], row["base_rss_bytes"]) == (memory.peak_rss, memory.base_rss)
        assert (row["peak_gpu_bytes"], row["peak_torch_bytes"]) == (None, None)
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
        "the process of 'right eager' was ended by SIGKILL while it was timed: most likely the system ran out of "
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
            EngineError, match=r"'right eager' failed while it was timed: ValueError: planted; --debug shows where"
        ) as caught:
            child.burst(REQUEST, UNET, 1, 0.0)
        assert "compare_faults.py" in caught.value.__notes__[0]  # where, for --debug
        assert len(child.images(REQUEST, 0).images) == 1
        with pytest.raises(AttributeError, match="serve"):
            child.serve()
    finally:
        child.close()
    assert multiprocessing.active_children() == []


def test_a_process_that_leaves_by_itself_is_one_message() -> None:
    child = IsolatedRunner(faulty(subjects()[0], leave), RunConfig("cpu"))
    try:
        child.open()
        with pytest.raises(EngineError, match="process of 'right eager' was ended with status 3 while it was timed"):
            child.burst(REQUEST, UNET, 1, 0.0)
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
    subject = dataclasses.replace(subjects()[0], run=Generation(2, 7.5, "HeunDiscreteScheduler"))
    runner = LocalRunner(subject, RunConfig("cpu", size=(32, 32)))
    opened = runner.open()
    assert (opened.size, opened.scheduler, opened.device) == ((32, 32), "HeunDiscreteScheduler", "cpu")
    assert runner.images(REQUEST, 0).unet_calls == 2 * REQUEST.run.steps - 1
    runner.close()
