"""A comparison of real pipelines: eager, eager in half, a student, an engine, and an engine of the wrong weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_models import engine_models
from helpers import tiny_pipeline
from PIL.Image import Image
from safetensors.torch import load_file, save_file

from sdkd.compare import Subject, compare
from sdkd.compare.measure.calls import Request, make_images, step_work
from sdkd.compare.measure.comparison import find_baselines, random_notes
from sdkd.compare.measure.results import Report
from sdkd.errors import EngineError, InputError, ParityError

QUICK: dict[str, Any] = {"prompts": ["a red star", "a blue ring"], "steps": 2, "runs": 3, "min_seconds": 0.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `teacher` and `tiny` with pipelines of equal text encoder and VAE."""
    folder = tmp_path_factory.mktemp("models")
    tiny_pipeline().save_pretrained(folder / "teacher")
    tiny_pipeline(student="tiny").save_pretrained(folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def report(models: Path) -> Report:
    """Teacher, teacher in bf16 and student, eager, with a judge."""

    def judge(images: Sequence[Image], prompts: Sequence[str]) -> Mapping[str, float]:
        assert [len(prompts), images[0].size] == [2, (64, 64)]
        return {"bright": sum(image.getextrema()[0][1] > 200 for image in images) / len(images)}

    subjects = [
        Subject("teacher eager", models / "teacher", role="teacher"),
        Subject("teacher eager-bf16", models / "teacher", precision="bf16", role="teacher"),
        Subject("tiny eager", models / "tiny", role="student"),
    ]
    return compare(subjects, judge=judge, baseline="tiny eager", command="sdkd compare", **QUICK)


def test_every_subject_is_measured(report: Report) -> None:
    assert [row.subject.label for row in report.results] == ["teacher eager", "teacher eager-bf16", "tiny eager"]
    for row in report.results:
        assert len(row.unet_step_ms.samples) == 3
        assert row.unet_step_ms.count >= 3
        assert row.image_s.count == 3
        assert row.unet_step_ms.median > 0
        assert row.first_call_s > 0
        assert row.repeatable
        assert row.attention == "SDPA, flash attention (CPU)"
        assert set(row.judged or {}) == {"bright"}
    assert (report.setup.size_px, report.setup.unet_batch, report.setup.scheduler) == (64, 2, "PNDMScheduler")
    json.dumps(report.to_json(), allow_nan=False)


def test_bf16_is_close_to_fp32_because_the_noise_is_the_same(report: Report) -> None:
    found = report.result("teacher eager-bf16").against_eager
    assert found is not None
    assert found.reference == "teacher eager"
    assert 25 < found.psnr_mean_db < 70


def test_the_student_is_compared_with_the_teacher_and_is_its_own_reference(report: Report) -> None:
    tiny = report.result("tiny eager")
    assert tiny.against_eager is None
    assert tiny.against_teacher is not None
    assert tiny.against_teacher.reference == "teacher eager"
    assert 5 < tiny.against_teacher.psnr_mean_db < 30
    assert report.result("teacher eager-bf16").against_teacher is None


def test_ratios_are_over_own_eager_teacher_and_baseline(report: Report) -> None:
    assert report.baselines == {
        "teacher eager": {"baseline": "tiny eager"},
        "teacher eager-bf16": {"eager": "teacher eager", "teacher": "teacher eager", "baseline": "tiny eager"},
        "tiny eager": {"teacher": "teacher eager"},
    }
    for row in report.results:
        assert set(row.step_speedup) == set(row.image_speedup) == set(report.baselines[row.subject.label])
    assert report.result("tiny eager").unet_parameters < report.result("teacher eager").unet_parameters / 2


def test_images_are_those_of_diffusers_with_the_same_seed(report: Report) -> None:
    pipe = tiny_pipeline()
    expected = pipe("a blue ring", num_inference_steps=2, generator=torch.Generator("cpu").manual_seed(1)).images[0]
    assert report.images["teacher eager"][1].tobytes() == expected.tobytes()


def test_baselines_prefer_float32() -> None:
    half, full = Subject("half", "m", precision="bf16"), Subject("full", "m")
    engine = Subject("engine", "m", "openvino", bundle=Path("b"))
    assert find_baselines(engine, [half, full, engine], None) == {"eager": "full"}
    assert find_baselines(engine, [half, engine], None) == {"eager": "half"}
    assert find_baselines(full, [half, full, engine], "half") == {"baseline": "half"}


def test_random_weights_are_said() -> None:
    subjects = [
        Subject("sd15-tiny eager", "random:sd15-tiny"),
        Subject("sd15-tiny eager-bf16", "random:sd15-tiny", precision="bf16"),
    ]
    assert random_notes(subjects) == ["sd15-tiny has random weights: its speed and size count, its images mean nothing"]


def test_without_guidance_the_unet_runs_at_batch_one() -> None:
    pipe = tiny_pipeline()
    calls = []
    pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(tuple(args[0].shape)))
    step_work(pipe, Request(("a",), 2, 1.0, 0, 64))()
    step_work(pipe, Request(("a",), 2, 7.5, 0, 64))()
    assert calls == [(1, 4, 8, 8), (2, 4, 8, 8)]
    assert [image.size for image in make_images(pipe, Request(("a",), 2, 1.0, 0, 64), 0)] == [(64, 64)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "a comparison needs prompts"),
        ({"prompts": ["a", " "]}, "a comparison needs prompts, none of them empty"),
        ({"steps": 0}, "steps 0 is too few"),
        ({"runs": 0}, "runs 0 is too few"),
        ({"image_runs": 0}, "image_runs 0 is too few"),
        ({"baseline": "huge"}, "baseline 'huge' is not among the subjects: choose one of teacher eager"),
        ({"size": 100}, "height 100 is not a multiple of 64 pixels"),
    ],
)
def test_bad_requests_are_refused(models: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare([Subject("teacher eager", models / "teacher")], **(QUICK | changes))


@pytest.fixture(scope="module")
def engines() -> Path:
    """Folders `right` and `wrong` with pipelines, and `bundle`: ONNX Runtime engines of `right`."""
    return engine_models()


def test_an_engine_of_the_same_weights_is_right_and_one_of_others_is_wrong(engines: Path) -> None:
    bundle = engines / "bundle"
    subjects = [
        Subject("right eager", engines / "right"),
        Subject("right onnxruntime", engines / "right", "onnxruntime", bundle=bundle),
        Subject("wrong onnxruntime", engines / "wrong", "onnxruntime", bundle=bundle),
    ]
    report = compare(subjects, **QUICK)
    right, wrong = report.result("right onnxruntime"), report.result("wrong onnxruntime")
    assert right.verdict is not None
    assert right.verdict.ok is True
    assert right.against_eager is not None
    assert right.against_eager.psnr_min_db >= 40
    assert wrong.verdict is not None
    assert wrong.verdict.ok is False
    assert wrong.against_eager is not None
    assert wrong.against_eager.reference == "wrong eager"  # made for the verdict, not timed
    assert right.attention is None
    assert right.unet_parameters == report.result("right eager").unet_parameters
    assert right.bytes_on_disk is not None
    with pytest.raises(ParityError, match=r"1 of 3 subjects broke a rule. 'wrong onnxruntime': worst image"):
        report.check()


def test_an_engine_whose_model_is_gone_is_measured_but_not_judged(engines: Path, tmp_path: Path) -> None:
    subjects = [Subject("gone onnxruntime", tmp_path / "gone", "onnxruntime", bundle=engines / "bundle")]
    report = compare(subjects, **QUICK)
    verdict = report.results[0].verdict
    assert verdict is not None
    assert (verdict.ok, verdict.found) == (None, "no eager images to compare with")
    assert report.ok
    assert len(report.notes) == 1
    assert report.notes[0].startswith("no reference images of gone eager: model ")


def test_a_reference_that_fails_costs_its_own_row_and_no_other(engines: Path, tmp_path: Path) -> None:
    """Weights that are not numbers: no likeness and no ratio to what failed, everything else measured."""
    bad = tmp_path / "bad"
    shutil.copytree(engines / "right", bad)
    weights = bad / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: torch.full_like(part, torch.nan) for name, part in load_file(weights).items()}, weights)
    subjects = [Subject("bad eager", bad), Subject("bad onnxruntime", bad, "onnxruntime", bundle=engines / "bundle")]
    report = compare(subjects, **QUICK)
    assert [row.subject.label for row in report.results] == ["bad onnxruntime"]
    row = report.results[0]
    assert row.unet_step_ms.count >= 3
    assert row.image_s.count == 3
    assert (row.step_speedup, row.against_eager) == ({}, None)
    assert row.verdict is not None
    assert (row.verdict.ok, row.verdict.found) == (None, "no eager images to compare with")
    assert report.notes == ()  # it was not tried again for its images
    (failed,) = report.to_json()["failed"]
    assert (failed["label"], failed["target"], failed["bundle"]) == ("bad eager", "eager", None)
    assert "images of prompt 1: pixels are not finite" in failed["reason"]
    assert report.to_json()["ok"] is False
    with pytest.raises(EngineError, match=r"1 of 2 subjects failed. 'bad eager': images of prompt 1: pixels are not"):
        report.check()
    again = Subject("again eager", bad)
    with pytest.raises(EngineError, match=r"no subject could be measured: 'bad eager': images .*; 'again eager': "):
        compare([subjects[0], again], **QUICK)


def test_pipelines_that_do_not_fit_together_are_opened_one_at_a_time(
    engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sdkd.compare.measure.cases as cases

    monkeypatch.setattr(cases, "MEMORY_SHARE", 0.0)
    subjects = [Subject("right eager", engines / "right"), Subject("wrong eager", engines / "wrong")]
    report = compare(subjects, **QUICK)
    assert not report.setup.open_together
    assert [len(row.unet_step_ms.samples) for row in report.results] == [3, 3]


def test_models_of_different_sizes_need_a_common_one(models: Path, engines: Path) -> None:
    subjects = [Subject("small eager", engines / "right"), Subject("teacher eager", models / "teacher")]
    with pytest.raises(InputError, match="'teacher eager': height 32 is not a multiple of 64 pixels"):
        compare(subjects, **QUICK)
