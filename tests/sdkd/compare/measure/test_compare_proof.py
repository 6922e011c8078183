"""Whole comparisons of real pipelines with planted faults, several images per call, a scheduler, and torch.compile.

Delays are planted in the timed UNet calls, on a planted clock that only they and a look at it move: sleeping would
prove the same on a quiet machine, and something else on a busy one.
"""

from __future__ import annotations

import functools
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compare_faults import plant
from compare_models import engine_models
from diffusers import UNet2DConditionModel
from helpers import fixed_weights
from small_exports import ONE_LEVEL, small_pipeline
from typer.testing import CliRunner, Result

import sdkd.compare.measure.runner as runner
import sdkd.compare.measure.subjects as kinds
from sdkd import cli
from sdkd.compare import Subject, compare
from sdkd.compare.measure.planning import Wish, _ranges, make_plan
from sdkd.compare.measure.quality import likeness
from sdkd.compare.measure.refusals import check_targets
from sdkd.compare.measure.timing import Timer
from sdkd.errors import EngineError, InputError

QUICK: dict[str, Any] = {"prompts": ["a red star", "a blue ring"], "steps": 2, "runs": 3, "min_seconds": 0.0}


class Clock:
    """A clock that moves by a millisecond when it is read, and by planted delays."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now

    def delay(self, seed: int, slower: float = 1.0) -> Callable[[], object]:
        """A delay of 0.2 s, up to 5 % less or more at random, `slower` times as long."""
        noise = random.Random(seed)

        def wait() -> object:
            self.now += 0.2 * slower * noise.uniform(0.95, 1.05)
            return None

        return wait


def call(*words: str) -> Result:
    settings = [
        "--in-process",
        "--prompts",
        "a red star",
        "--steps",
        "1",
        "--runs",
        "9",
        "--targets",
        "eager,onnxruntime",
    ]
    return CliRunner().invoke(cli.app, ["compare", str(engine_models() / "bundle"), *settings, *words])


def verdicts(folder: Path) -> dict[str, str]:
    found = json.loads((folder / "report.json").read_text())["against"]
    return {subject["label"]: subject["verdict"] for subject in found["subjects"]}


def test_a_planted_slowdown_is_found_and_none_is_a_tie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, labels = Clock(), ("bundle eager", "bundle onnxruntime")
    monkeypatch.setattr(runner, "Timer", functools.partial(Timer, clock=clock, cpu_clock=clock))
    plant(monkeypatch, {label: clock.delay(seed) for seed, label in enumerate(labels)})
    assert call("--output", str(tmp_path / "old")).exit_code == 0
    plant(monkeypatch, {labels[0]: clock.delay(10), labels[1]: clock.delay(11, slower=1.2)})
    old = str(tmp_path / "old" / "report.json")
    again = call("--output", str(tmp_path / "new"), "--against", old)
    assert again.exit_code == 1
    message = " ".join(again.stderr.split())
    assert "1 of 2 subjects is worse than in" in message
    assert "'bundle onnxruntime': a UNet step takes" in message
    assert verdicts(tmp_path / "new") == {"bundle eager": "tie", "bundle onnxruntime": "slower"}
    change = json.loads((tmp_path / "new" / "report.json").read_text())["against"]["subjects"][1]
    assert change["step_speedup"]["value"] == pytest.approx(1 / 1.2, rel=0.04)
    assert "Against " in (tmp_path / "new" / "report.md").read_text()


def test_images_of_one_call_are_those_of_calls_alone() -> None:
    model = engine_models() / "right"
    two = compare([Subject("a", model)], batch=2, image_runs=1, **QUICK)
    alone = compare([Subject("a", model)], image_runs=1, **QUICK | {"prompts": ["a red star", "a blue ring"] * 2})
    assert (two.setup.batch, two.setup.unet_batch, alone.setup.unet_batch) == (2, 4, 2)
    assert len(two.images["a"]) == len(two.setup.image_prompts) == 4
    # Sums of a larger matrix product are rounded otherwise; another seed's image would be 10 dB away.
    assert likeness(two.images["a"], alone.images["a"], "").psnr_min_db > 40
    assert likeness(two.images["a"][:1], two.images["a"][2:3], "").psnr_min_db < 40
    row = two.results[0]
    assert row.repeatable
    assert row.image_cpu_s is not None
    assert row.images_per_s == pytest.approx(1 / row.image_s.median)


def test_a_scheduler_is_for_all_subjects_and_their_references() -> None:
    model, bundle = engine_models() / "right", engine_models() / "bundle"
    subjects = [Subject("right onnxruntime", model, "onnxruntime", bundle=bundle)]
    report = compare(subjects, scheduler="ddim", **QUICK)
    assert report.setup.scheduler == "DDIMScheduler"
    verdict = report.results[0].verdict
    assert verdict is not None
    assert verdict.ok is True  # against eager images of the same scheduler
    with pytest.raises(InputError, match="scheduler 'dice' is unknown: choose one of ddim"):
        compare(subjects, scheduler="dice", **QUICK)


def test_settings_are_recorded_in_the_report_and_the_command(tmp_path: Path) -> None:
    found = call("--batch", "1", "--scheduler", "ddim", "--output", str(tmp_path / "out"))
    assert found.exit_code == 0, found.output
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (data["setup"]["batch"], data["setup"]["scheduler"], data["against"]) == (1, "DDIMScheduler", None)
    assert "--batch 1 --scheduler ddim" in data["command"]


def test_engines_are_built_for_the_batch(tmp_path: Path) -> None:
    assert str(_ranges(Wish(None, None, (64, 64), tmp_path, 3))) == "batch 3, height 64 px, width 64 px, 77 tokens"
    assert _ranges(Wish(None, None, None, tmp_path, 4)) is None
    with pytest.raises(InputError, match=r"batch 8 is outside 1..4, which engines are built for by default: give --s"):
        _ranges(Wish(None, None, None, tmp_path, 8))


def test_compile_is_a_target(tmp_path: Path) -> None:
    wish = Wish(("eager", "compile", "compile-bf16"), None, None, tmp_path)
    rows = make_plan([str(engine_models() / "right")], wish).subjects
    assert [(row.label, row.target, row.precision) for row in rows] == [
        ("right eager", "eager", "fp32"),
        ("right compile", "compile", "fp32"),
        ("right compile-bf16", "compile", "bf16"),
    ]
    assert [row.runs_as for row in rows] == ["eager", "compile", "compile-bf16"]
    with pytest.raises(InputError, match="precision 'int4' is unknown"):
        check_targets(("compile-int4",))


def one_level(folder: Path) -> list[Subject]:
    """The smallest model that there is, eagerly and compiled: a compiler follows every layer."""
    pipe = small_pipeline()
    pipe.unet = fixed_weights(UNet2DConditionModel(**ONE_LEVEL))
    pipe.save_pretrained(folder / "one")
    return [Subject("one eager", folder / "one"), Subject("one compile", folder / "one", "compile")]


def test_a_compiled_unet_is_measured_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, known = [], []

    def backend(graph: Any, inputs: object) -> Any:
        graphs.append(graph)
        time.sleep(0.5)  # a compiler takes its time
        return graph.forward

    monkeypatch.setattr(kinds, "COMPILER", {**kinds.COMPILER, "backend": backend})
    plant(monkeypatch, {"one compile": lambda: known.append(len(graphs))})
    subjects = one_level(tmp_path)
    report = compare(subjects, **QUICK)
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
