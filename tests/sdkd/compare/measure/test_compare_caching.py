"""Step caching in comparisons: which subjects get it, what their images and steps are held against."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from compare_models import engine_models
from made_once import made_once
from small_exports import variant_bundle

import sdkd.workflow
from export.build.engines import build_engine
from sdkd.bundle.manifest import Bundle
from sdkd.compare import Subject, compare
from sdkd.compare.measure.peers import PEERS, check_graphs
from sdkd.compare.measure.planning import Wish, make_plan
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.errors import BundleError, InputError
from sdkd.models.generation import Generation


def _build(folder: Path) -> None:
    shutil.copytree(variant_bundle("cached"), folder)
    bundle = Bundle.open(folder)
    source = {"model": str(engine_models() / "right")}
    Bundle(bundle.path, dataclasses.replace(bundle.manifest, source=source)).save()
    one = ShapeRanges(Range(1, 1, 1), Range.fixed(32), Range.fixed(32), Range.fixed(77))
    build_engine(folder, "onnxruntime", ranges=one)


@pytest.fixture(scope="module")
def bundle() -> Path:
    """ONNX Runtime engines of the small pipeline, for step caching."""
    return made_once("compare-cached", _build)


def wish(folder: Path, *targets: str, interval: int = 3) -> Wish:
    return Wish(targets or None, None, (32, 32), folder, cache_interval=interval)


def test_cached_subjects_are_held_against_every_step_and_judged_by_the_same_interval(
    bundle: Path, tmp_path: Path
) -> None:
    plan = make_plan([str(bundle)], wish(tmp_path, "eager", "onnxruntime"))
    labels = [f"{bundle.name} {name}" for name in ("eager", "eager cache 3", "onnxruntime", "onnxruntime cache 3")]
    assert [(row.label, row.cache_interval) for row in plan.subjects] == list(zip(labels, (1, 3, 1, 3), strict=True))
    assert [row.runs_as for row in plan.subjects[::3]] == ["eager", "onnxruntime cache 3"]
    assert {row.model_label for row in plan.subjects} == {bundle.name}
    run = Generation(6, 7.5)
    subjects = [dataclasses.replace(row, run=run) for row in plan.subjects]
    report = compare(subjects, prompts=["a red star", "a blue ring"], runs=3, min_seconds=0.0, image_runs=1)
    whole, cached, engine, both = report.results
    assert (whole.against_eager, engine.verdict and engine.verdict.ok) == (None, True)
    assert cached.against_eager is not None
    assert both.against_eager is not None
    assert cached.against_eager.reference == both.against_eager.reference == labels[0]
    assert 5 < cached.against_eager.psnr_mean_db < 35  # other images than every step computed
    assert both.against_eager.psnr_mean_db == pytest.approx(cached.against_eager.psnr_mean_db, abs=0.5)
    assert both.verdict is not None
    assert both.verdict.ok  # though it is not near eager that computes every step
    assert both.verdict.rule == "every image is at least 40 dB PSNR from eager fp32, all with cache interval 3"
    assert cached.verdict is None
    assert report.baselines == {labels[0]: {}} | {key: {"eager": labels[0]} for key in labels[1:]}
    assert (whole.limit is None, cached.limit, both.limit) == (False, None, None)
    assert any(
        f"{labels[3]}: its UNet step is the mean of a whole call and the 2 that reuse it" in n for n in report.notes
    )
    assert (both.parameters, both.unet_parameters) == (engine.parameters, engine.unet_parameters)
    assert (both.bytes_on_disk or 0) > (engine.bytes_on_disk or 0)
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert [row["cache_interval"] for row in data["results"]] == [1, 3, 1, 3]


def test_a_wrong_last_layer_is_found(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    opened = Bundle.open(tmp_path / "bundle")
    engine = Subject("engine", engine_models() / "wrong", "onnxruntime", bundle=opened.path, cache_interval=2)
    report = compare([engine], prompts=["a"], steps=2, runs=3, min_seconds=0.0, image_runs=1)
    assert [row.verdict and row.verdict.ok for row in report.results] == [False]


def test_optimum_is_given_no_bundle_for_step_caching(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"it takes the UNet's second output for the prediction; leave out target"):
        check_graphs(PEERS["optimum"], Bundle.open(bundle))


def test_models_that_it_does_not_suit_are_left_out_with_a_note(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = tmp_path / "few"
    shutil.copytree(engine_models() / "right", few)
    (few / "sdkd.json").write_text(json.dumps({"generation": Generation(4, 1.0, "LCMScheduler").to_json()}))
    right = str(engine_models() / "right")
    plan = make_plan([right, str(few)], wish(tmp_path, "eager", "compile"))
    assert [row.label for row in plan.subjects] == [
        "right eager", "right eager cache 3", "right compile", "few eager", "few compile"
    ]  # fmt: skip
    assert [note[:70] for note in plan.notes] == [
        "few eager: no step caching (step caching reuses what neighbouring steps"[:70]
    ]
    old = make_plan([str(engine_models() / "bundle")], wish(tmp_path, "eager", "onnxruntime"))
    assert any(note.startswith("bundle onnxruntime: no step caching (bundle '") for note in old.notes)
    with pytest.raises(
        InputError, match=r"cache interval 3 suits nothing that is compared: few eager: no step caching"
    ):
        make_plan([str(few)], wish(tmp_path, "eager"))
    with pytest.raises(InputError, match=r"cache interval 0 is too small"):
        make_plan([right], wish(tmp_path, "eager", interval=0))
    with pytest.raises(InputError, match=r"cache interval 3 would change every row of a staircase"):
        make_plan([right, str(few)], dataclasses.replace(wish(tmp_path), staircase=True))
    with pytest.raises(InputError, match=r"runs on 'compile', which caches no steps"):
        Subject("x", right, "compile", cache_interval=2)
    asked: list[Any] = []

    def prepare(source: Any, plan: Any, folder: Any, *, cached: bool, **_: Any) -> Any:
        asked.append(cached)
        raise BundleError("not here")

    monkeypatch.setattr(sdkd.workflow, "prepare", prepare)
    failed = make_plan([right, str(few)], wish(tmp_path, "onnxruntime")).failed
    assert [one.subject.label for one in failed] == [
        "right onnxruntime",
        "right onnxruntime cache 3",
        "few onnxruntime",
    ]
    assert asked == [True, True, False]
