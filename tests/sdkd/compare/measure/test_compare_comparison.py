"""Comparisons of real pipelines: eager, in half, compiled, a student, engines that are right, wrong or broken."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_faults import plant
from compare_models import engine_models
from helpers import tiny_pipeline
from PIL.Image import Image
from safetensors.torch import load_file, save_file
from small_exports import ONE_LEVEL, small_pipeline

import sdkd.compare.measure.cases as cases
import sdkd.compare.measure.subjects as kinds
from sdkd.compare import Subject, compare
from sdkd.compare.measure.calls import Request, make_images, step_work
from sdkd.compare.measure.comparison import random_notes
from sdkd.compare.measure.outcome import find_baselines
from sdkd.compare.measure.quality import likeness
from sdkd.compare.measure.runner import Drawn, Opened
from sdkd.errors import EngineError, InputError, ParityError
from sdkd.models.generation import Generation
from sdkd.models.resolve import load_eager
from sdkd.models.schedulers import use_scheduler

QUICK: dict[str, Any] = {"prompts": ["a red star", "a blue ring"], "steps": 2, "runs": 3, "min_seconds": 0.0}


def onnxruntime(model: str | Path) -> Subject:
    """The engines of `right`, as if they were of this model."""
    folder = engine_models()
    return Subject(f"{Path(model).name} onnxruntime", folder / model, "onnxruntime", bundle=folder / "bundle")


def test_a_teacher_in_two_precisions_and_its_student(tmp_path: Path) -> None:
    teacher, tiny = tiny_pipeline(), tiny_pipeline(student="tiny")
    teacher.save_pretrained(tmp_path / "teacher")
    tiny.save_pretrained(tmp_path / "tiny")

    def judge(images: Sequence[Image], prompts: Sequence[str]) -> Mapping[str, float]:
        assert [len(prompts), images[0].size] == [2, (64, 64)]
        return {"bright": sum(image.getextrema()[0][1] > 200 for image in images) / len(images)}

    subjects = [
        Subject("teacher eager", tmp_path / "teacher", role="teacher"),
        Subject("teacher eager-bf16", tmp_path / "teacher", precision="bf16", role="teacher"),
        Subject("tiny eager", tmp_path / "tiny", role="student"),
    ]
    report = compare(subjects, judge=judge, baseline="tiny eager", command="sdkd compare", **QUICK)
    run = Generation(2, 7.5)
    assert [row.subject for row in report.results] == [dataclasses.replace(each, run=run) for each in subjects]
    for row in report.results:
        assert len(row.unet_step_ms.samples) == 3
        assert row.unet_step_ms.count >= 3
        assert row.image_s.count == 3
        assert row.unet_step_ms.median > 0
        assert row.first_call_s > 0
        assert row.repeatable
        assert row.attention == "SDPA, flash attention (CPU)"
        assert set(row.judged or {}) == {"bright"}
        assert set(row.step_speedup) == set(row.image_speedup) == set(report.baselines[row.subject.label])
    assert {(row.unet_batch, row.run) for row in report.results} == {(2, Generation(2, 7.5, "PNDMScheduler"))}
    assert report.setup.size_px == 64
    json.dumps(report.to_json(), allow_nan=False)

    first, half, student = report.results
    assert half.against_eager is not None
    assert half.against_eager.reference == "teacher eager"
    assert 25 < half.against_eager.psnr_mean_db < 70  # close, because the noise is the same
    assert (half.against_teacher, student.against_eager) == (None, None)  # the student is its own reference
    assert student.against_teacher is not None
    assert student.against_teacher.reference == "teacher eager"
    assert 5 < student.against_teacher.psnr_mean_db < 30
    assert student.unet_parameters < first.unet_parameters / 2
    assert report.baselines == {
        "teacher eager": {"baseline": "tiny eager"},
        "teacher eager-bf16": {"eager": "teacher eager", "teacher": "teacher eager", "baseline": "tiny eager"},
        "tiny eager": {"teacher": "teacher eager"},
    }
    seed = torch.Generator("cpu").manual_seed(1)
    expected = teacher("a blue ring", num_inference_steps=2, generator=seed).images[0]
    assert report.images["teacher eager"][1].tobytes() == expected.tobytes()  # as diffusers makes it


def test_baselines_prefer_float32_and_random_weights_are_said() -> None:
    half, full = Subject("half", "m", precision="bf16"), Subject("full", "m")
    engine = Subject("engine", "m", "openvino", bundle=Path("b"))
    assert find_baselines(engine, [half, full, engine], None) == {"eager": "full"}
    assert find_baselines(engine, [half, engine], None) == {"eager": "half"}
    assert find_baselines(full, [half, full, engine], "half") == {"baseline": "half"}
    made = [(f"sd15-tiny {name}", "random:sd15-tiny", name) for name in ("eager", "compile")]
    named = [Subject(*each) for each in made]
    assert random_notes(named) == ["sd15-tiny has random weights: its speed and size count, its images mean nothing"]


def test_without_guidance_the_unet_runs_at_batch_one() -> None:
    pipe, calls = tiny_pipeline(), []
    pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(tuple(args[0].shape)))
    step_work(pipe, Request(("a",), 0, 64, run=Generation(2, 1.0)))()
    step_work(pipe, Request(("a",), 0, 64, run=Generation(2, 7.5)))()
    assert calls == [(1, 4, 8, 8), (2, 4, 8, 8)]
    assert [image.size for image in make_images(pipe, Request(("a",), 0, 64, run=Generation(2, 1.0)), 0)] == [(64, 64)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "a comparison needs prompts"),
        ({"prompts": ["a", " "]}, "a comparison needs prompts, none of them empty"),
        ({"steps": 0}, "steps 0 is too small: give a whole number from 1"),
        ({"runs": 0}, "^runs 0 is too small"),
        ({"image_runs": 0}, "image runs 0 is too small"),
        ({"baseline": "huge"}, "baseline 'huge' is not among the subjects: choose one of right eager"),
        ({"size": 30}, "'right eager': height 30 is not a multiple of 4 pixels"),
        ({}, "'demo eager': height 32 is not a multiple of 64 pixels"),  # the first model's own size is no other's
        ({"scheduler": "dice"}, "scheduler 'dice' is unknown: choose one of ddim"),
    ],
)
def test_bad_requests_are_refused(changes: dict[str, Any], message: str) -> None:
    subjects = [Subject("right eager", engine_models() / "right"), Subject("demo eager", "demo")]
    with pytest.raises(InputError, match=message):
        compare(subjects[:1] if changes else subjects, **(QUICK | changes))


def test_engines_are_judged_by_eager_images_of_their_own_model(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    subjects = [Subject("right eager", engine_models() / "right"), *map(onnxruntime, ("right", "wrong", gone))]
    report = compare(subjects, **QUICK)
    eager, right, wrong, lost = report.results
    for row in (right, wrong, lost):
        assert row.verdict is not None
    assert right.verdict.ok is True
    assert right.against_eager.psnr_min_db >= 40
    assert wrong.verdict.ok is False
    assert wrong.against_eager.reference == "wrong eager"  # made for the verdict, not timed
    assert (lost.verdict.ok, lost.verdict.found) == (None, "no eager images to compare with")
    assert right.attention is None
    assert right.unet_parameters == eager.unet_parameters
    assert right.bytes_on_disk is not None
    (note,) = report.notes
    assert note.startswith("no reference images of gone eager: model ")
    with pytest.raises(ParityError, match=r"1 of 4 subjects broke a rule. 'wrong onnxruntime': worst image"):
        report.check()


def test_subjects_of_their_own_steps_and_guidance_are_held_against_eager_of_the_same_run() -> None:
    few, folder = Generation(1, 1.0, "LCMScheduler"), engine_models()
    subjects = [
        Subject("teacher eager", folder / "wrong", role="teacher"),
        Subject("few eager", folder / "right", role="student", run=few),
        Subject("few onnxruntime", folder / "right", "onnxruntime", "fp32", folder / "bundle", "student", run=few),
        Subject("right onnxruntime", folder / "right", "onnxruntime", "fp32", folder / "bundle", "student"),
    ]
    report = compare(subjects, **QUICK)
    teacher, eager, engine, usual = report.results
    assert [row.run for row in report.results] == [Generation(2, 7.5, "DDIMScheduler"), few, few, teacher.run]
    assert [(row.unet_calls, row.unet_batch) for row in report.results[:3]] == [(2, 2), (1, 1), (1, 1)]
    assert [row.against_eager.reference for row in (engine, usual) if row.against_eager] == ["few eager", "right eager"]
    assert all(row.verdict and row.verdict.ok for row in (engine, usual))
    assert eager.against_teacher is not None
    assert eager.against_teacher.reference == "teacher eager"
    assert report.baselines["few onnxruntime"] == {"eager": "few eager", "teacher": "teacher eager"}
    assert report.baselines["right onnxruntime"] == {"teacher": "teacher eager"}  # no eager of its own run is timed
    assert teacher.work is not None
    assert eager.work is not None
    assert teacher.work.flops == pytest.approx(2 * eager.work.flops, rel=0.01)
    notes = [note for note in report.notes if "different calls" in note]
    assert notes == [
        "Steps with and without guidance are different calls (2 of teacher eager, 1 of few eager, in latents): their "
        "ratio is of one call each, that of images tells what an image gains"
    ]
    assert report.mixed
    made = load_eager(folder / "right")
    use_scheduler(made, "LCMScheduler")
    seed = torch.Generator("cpu").manual_seed(0)
    drawn = made("a red star", num_inference_steps=1, guidance_scale=1.0, generator=seed).images[0]
    assert report.images["few eager"][0].tobytes() == drawn.tobytes()  # as diffusers makes it
    with pytest.raises(InputError, match=r"'few eager': steps 1001 is too large"):
        compare([dataclasses.replace(subjects[1], run=Generation(1001, 1.0))], **QUICK)


def test_a_reference_that_fails_costs_its_own_row_and_no_other(tmp_path: Path) -> None:
    """Weights that are not numbers: no likeness and no ratio to what failed, everything else measured."""
    bad = tmp_path / "bad"
    shutil.copytree(engine_models() / "right", bad)
    weights = bad / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: torch.full_like(part, torch.nan) for name, part in load_file(weights).items()}, weights)
    subjects = [Subject("bad eager", bad), onnxruntime(bad)]
    report = compare(subjects, **QUICK)
    (row,) = report.results
    assert row.subject.label == "bad onnxruntime"
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


def test_one_scheduler_for_all_and_pipelines_that_do_not_fit_together_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cases, "MEMORY_SHARE", 0.0)
    opened, drawn = list[str](), list[str]()

    class Noted(cases.LocalRunner):
        def open(self) -> Opened:
            opened.append(self.subject.label)
            return super().open()

        def images(self, request: Request, prompt: int) -> Drawn:
            drawn.append(self.subject.label)
            return super().images(request, prompt)

    monkeypatch.setattr(cases, "LocalRunner", Noted)
    report = compare(
        [onnxruntime("right"), Subject("wrong eager", engine_models() / "wrong")], scheduler="ddim", **QUICK
    )
    assert not report.setup.open_together
    assert [len(row.unet_step_ms.samples) for row in report.results] == [3, 3]
    assert [[len(part) for part in row.image_s.samples] for row in report.results] == [[1, 1, 1]] * 2
    # First images and three rounds; one stays open for the next.
    alternating = ["right onnxruntime", "wrong eager"] * 3
    assert opened == [*alternating, "right onnxruntime", "right eager"]  # the last one is the reference
    # Two prompts, then an image each round, after one that does not count where the subject was just opened.
    assert [drawn.count(label) for label in alternating[:2]] == [2 + 3 + 3, 2 + 3 + 2]
    assert {row.run.scheduler for row in report.results} == {"DDIMScheduler"}
    verdict = report.results[0].verdict
    assert verdict is not None
    assert verdict.ok is True  # against eager images of the same scheduler


def test_images_of_one_call_are_those_of_calls_alone() -> None:
    model = engine_models() / "right"
    two = compare([Subject("a", model)], batch=2, image_runs=1, **QUICK)
    alone = compare([Subject("a", model)], image_runs=1, **QUICK | {"prompts": ["a red star", "a blue ring"] * 2})
    assert (two.setup.batch, two.results[0].unet_batch, alone.results[0].unet_batch) == (2, 4, 2)
    assert len(two.images["a"]) == len(two.setup.image_prompts) == 4
    # Sums of a larger matrix product are rounded otherwise; another seed's image would be 10 dB away.
    assert likeness(two.images["a"], alone.images["a"], "").psnr_min_db > 40
    assert likeness(two.images["a"][:1], two.images["a"][2:3], "").psnr_min_db < 40
    row = two.results[0]
    assert row.repeatable
    assert row.images_per_s == pytest.approx(1 / row.image_s.median)


def one_level(folder: Path) -> list[Subject]:
    """The smallest model that there is, eagerly and compiled: a compiler follows every layer."""
    small_pipeline(**ONE_LEVEL).save_pretrained(folder / "one")
    return [Subject("one eager", folder / "one"), Subject("one compile", folder / "one", "compile")]


def test_a_compiled_unet_is_measured_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, known = [], []

    def backend(graph: Any, inputs: object) -> Any:
        graphs.append(graph)
        time.sleep(0.5)  # a compiler takes its time
        return graph.forward

    monkeypatch.setattr(kinds, "COMPILER", {**kinds.COMPILER, "backend": backend})
    plant(monkeypatch, {"one compile": lambda: known.append(len(graphs))})
    report = compare(one_level(tmp_path), **QUICK)
    row = report.result("one compile")
    assert graphs
    assert row.first_call_s > 0.5
    assert set(known[1:]) == {len(graphs)}  # nothing is compiled after the first UNet call of the warm-up
    assert row.verdict is not None
    assert row.verdict.ok is True
    assert row.against_eager is not None
    assert row.against_eager.reference == "one eager"
    assert set(row.step_speedup) == {"eager"}
    assert report.notes == ()


def test_a_subject_that_the_compiler_fails_on_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(graph: object, inputs: object) -> Any:
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(kinds, "COMPILER", {**kinds.COMPILER, "backend": backend})
    subjects = one_level(tmp_path)
    report = compare(subjects, baseline="one compile", **QUICK)
    assert [row.subject.label for row in report.results] == ["one eager"]
    with pytest.raises(EngineError, match=r"1 of 2 subjects failed. 'one compile': torch.compile failed .*install"):
        report.check()
    with pytest.raises(EngineError, match=r"^torch.compile failed \(backend='backend' raised"):
        compare(subjects[1:], **QUICK)
