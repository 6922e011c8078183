"""From model names, targets and prompts to subjects."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from compare_models import engine_models
from helpers import tiny_pipeline
from training_runs import small_vae

import sdkd.compare.measure.refusals as refusals
from sdkd.bundle.manifest import Bundle
from sdkd.compare.cli import DEMO
from sdkd.compare.measure.defaults import PHOTOGRAPHS, SHAPES, RunsAsked, default_guidance, default_judge, parse_prompts
from sdkd.compare.measure.peers import PEERS, peer_problem
from sdkd.compare.measure.planning import Wish, _ranges, find_roles, make_plan, short_names
from sdkd.compare.measure.refusals import check_targets
from sdkd.compare.measure.subjects import open_subject, size_on_disk
from sdkd.errors import BundleError, EngineError, InputError, ModelError
from sdkd.models.generation import Generation
from sdkd.targets.registry import availability
from sdkd.toyworld.scenes import parse_caption, render


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `base` and `tiny`, the second with the provenance of a student."""
    folder = tmp_path_factory.mktemp("planning")
    tiny_pipeline().save_pretrained(folder / "base")
    tiny_pipeline(student="tiny").save_pretrained(folder / "tiny")
    (folder / "tiny" / "sdkd.json").write_text(json.dumps({"teacher": str(folder / "base"), "student": "sd-tiny"}))
    return folder


def wish(tmp_path: Path, *targets: str) -> Wish:
    return Wish(targets or None, None, None, tmp_path)


def test_prompts_come_from_a_list_a_file_or_what_the_model_knows(models: Path, tmp_path: Path) -> None:
    assert parse_prompts("a red star ; ; a blue ring", []) == ("a red star", "a blue ring")
    (tmp_path / "prompts.txt").write_text("one\n\n  two; with a semicolon\n")
    assert parse_prompts(str(tmp_path / "prompts.txt"), []) == ("one", "two; with a semicolon")
    assert parse_prompts("x" * 5000, []) == ("x" * 5000,)
    assert parse_prompts(None, [str(models / "base")]) == SHAPES
    assert parse_prompts(None, [str(models / "base"), "random:sd15-tiny"]) == PHOTOGRAPHS
    assert default_guidance([str(models / "base")]) == 4.0
    assert default_guidance([str(models / "base"), "random:sd15-tiny"]) == 7.5
    with pytest.raises(InputError, match="prompts ' ; ' hold no prompt"):
        parse_prompts(" ; ", [])
    with pytest.raises(InputError, match=r"prompts file '.*nowhere.txt' does not exist"):
        parse_prompts(str(tmp_path / "nowhere.txt"), [])


def test_images_of_drawn_shapes_are_read_and_others_have_no_reader() -> None:
    judge = default_judge([DEMO], SHAPES, None)
    assert judge is not None
    drawn = [render(parse_caption(text), seed=1) for text in SHAPES]
    assert judge(drawn, SHAPES) == {"shape": 1.0, "colour": 1.0, "background": 1.0}
    swapped = [drawn[1], drawn[0], *drawn[2:]]  # star and heart
    assert judge(swapped, SHAPES) == {"shape": 0.5, "colour": 0.5, "background": 0.5}
    assert default_judge([DEMO], ("a red star",), None) is None  # no caption of the demo's
    assert default_judge([DEMO, "random:sd15-tiny"], SHAPES, None) is None  # a model that draws anything
    assert default_judge([DEMO], SHAPES, (8, 64)) is None  # too small to be read


def test_names_are_short_where_that_is_enough() -> None:
    assert short_names(["a/tiny", "b/small.safetensors", "random:sd15-tiny"]) == ["tiny", "small", "random-sd15-tiny"]
    assert short_names(["a/tiny", "b/tiny", "demo"]) == ["a/tiny", "b/tiny", "demo"]
    with pytest.raises(InputError, match="model 'demo' is given twice"):
        short_names(["demo", "demo"])


def test_roles_follow_what_sdkd_wrote_about_a_student(models: Path) -> None:
    base, tiny = str(models / "base"), str(models / "tiny")
    assert find_roles([base, tiny]) == {base: "teacher", tiny: "student"}
    assert find_roles([base]) == {base: "model"}
    assert find_roles([tiny]) == {tiny: "student"}


def test_pytorch_is_a_target_in_several_precisions(models: Path, tmp_path: Path) -> None:
    plan = make_plan(
        [str(models / "base"), str(models / "tiny")], wish(tmp_path, "eager", "eager-bf16", "compile-bf16")
    )
    assert [(row.label, row.target, row.precision, row.role) for row in plan.subjects] == [
        ("base eager", "eager", "fp32", "teacher"),
        ("base eager-bf16", "eager", "bf16", "teacher"),
        ("base compile-bf16", "compile", "bf16", "teacher"),
        ("tiny eager", "eager", "fp32", "student"),
        ("tiny eager-bf16", "eager", "bf16", "student"),
        ("tiny compile-bf16", "compile", "bf16", "student"),
    ]
    assert [row.runs_as for row in plan.subjects[:3]] == ["eager", "eager-bf16", "compile-bf16"]
    assert plan.notes == []


def test_every_model_is_run_as_it_was_made_for_unless_something_is_asked_for(models: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    shutil.copytree(models / "tiny", few)
    note = {"steps": 4, "guidance_scale": 1.0, "scheduler": "LCMScheduler"}
    (few / "sdkd.json").write_text(json.dumps({"student": "sd-tiny", "generation": note}))
    asked, eager = [str(models / "base"), str(few)], wish(tmp_path, "eager", "eager-bf16")
    plan = make_plan(asked, eager)
    made = [Generation(25, 4.0), Generation(4, 1.0, "LCMScheduler")]
    assert [subject.run for subject in plan.subjects] == [made[0], made[0], made[1], made[1]]
    assert plan.notes == []
    plan = make_plan(asked, dataclasses.replace(eager, runs=RunsAsked(25, 7.5)))
    assert {subject.run for subject in plan.subjects} == {Generation(25, 7.5), Generation(25, 7.5, "LCMScheduler")}
    assert [note.split(":")[0] for note in plan.notes] == ["few", "few"]
    assert "few: 25 steps on a model that was made for 4" in plan.notes[0]
    (few / "sdkd.json").write_text(json.dumps({"generation": note | {"steps": 0}}))
    assert make_plan(asked, eager).notes[0].startswith("few: how it is to be run could not be read (")


def test_a_staircase_adds_one_change_at_a_time(models: Path, tmp_path: Path) -> None:
    asked = [str(models / "base"), str(models / "tiny")]
    series = dataclasses.replace(wish(tmp_path), vae=str(small_vae()), size=(64, 64), staircase=True)
    plan = make_plan(asked, series)
    assert [(row.label, row.role, row.precision) for row in plan.subjects] == [
        ("base eager", "teacher", "fp32"),
        ("tiny eager", "student", "fp32"),
        ("tiny with small-vae eager", "student", "fp32"),
    ]
    seen: list[str] = []

    def stop(labels: list[str]) -> None:
        seen.extend(labels)
        raise InputError("enough")

    with pytest.raises(InputError, match="enough"):  # before any engine is built
        make_plan(asked, dataclasses.replace(series, targets=("onnxruntime",)), check=stop)
    assert seen == [*(row.label for row in plan.subjects), "tiny with small-vae onnxruntime"]
    with pytest.raises(InputError, match=r"bundle' is a bundle, and a staircase goes from models in PyTorch"):
        make_plan([asked[0], str(engine_models() / "bundle")], series)
    with pytest.raises(InputError, match=r"target 'eager-bf16' is no step of a staircase"):
        make_plan(asked, dataclasses.replace(series, targets=("onnxruntime", "eager-bf16")))
    with pytest.raises(InputError, match="a staircase of one subject has no step: give more models, --vae or --targ"):
        make_plan(asked[:1], dataclasses.replace(wish(tmp_path), staircase=True))


def test_another_vae_is_compared_with_the_models_own(models: Path, tmp_path: Path) -> None:
    vae, asked = str(small_vae()), [str(models / "base"), str(engine_models() / "bundle")]
    plan = make_plan(asked, dataclasses.replace(wish(tmp_path, "eager"), size=(64, 64), vae=vae))
    assert [(row.label, row.role, row.replaced) for row in plan.subjects] == [
        ("base eager", "teacher", ()),
        ("bundle eager", "model", ()),
        ("base with small-vae eager", "student", (("vae", vae),)),
    ]
    assert plan.notes == ["bundles keep the VAE that they were exported with: small-vae is for models alone"]
    own, other = (size_on_disk(plan.subjects[place]) or 0 for place in (0, 2))
    files = (models / "base" / "vae", small_vae())
    first, second = ((folder / "diffusion_pytorch_model.safetensors").stat().st_size for folder in files)
    assert own - other == first - second
    pipe = open_subject(plan.subjects[2])
    assert type(pipe.vae).__name__ == "AutoencoderTiny"
    with pytest.raises(InputError, match="is a bundle and has its VAE in it"):
        make_plan(asked[1:], dataclasses.replace(wish(tmp_path), vae=vae))
    with pytest.raises(ModelError, match=r"its teacher's scaling factor is 0\.6\d+, the model needs"):
        make_plan(asked, dataclasses.replace(wish(tmp_path), vae="demo"))


def test_a_bundle_brings_its_engines_and_its_model_as_eager(tmp_path: Path) -> None:
    folder = engine_models()
    plan = make_plan([str(folder / "bundle")], wish(tmp_path))
    assert [(row.label, row.target, row.model_key) for row in plan.subjects] == [
        ("bundle eager", "eager", str(folder / "right")),
        ("bundle onnxruntime", "onnxruntime", str(folder / "right")),
    ]
    assert plan.subjects[1].bundle == folder / "bundle"
    only = make_plan([str(folder / "bundle")], wish(tmp_path, "onnxruntime"))
    assert [row.label for row in only.subjects] == ["bundle onnxruntime"]


def test_a_bundle_whose_model_is_gone_is_compared_without_eager(tmp_path: Path) -> None:
    shutil.copytree(engine_models() / "bundle", tmp_path / "bundle")
    opened = Bundle.open(tmp_path / "bundle")
    Bundle(opened.path, dataclasses.replace(opened.manifest, source={"model": str(tmp_path / "gone")})).save()
    plan = make_plan([str(tmp_path / "bundle")], wish(tmp_path))
    assert [row.label for row in plan.subjects] == ["bundle onnxruntime"]
    assert len(plan.notes) == 1
    assert plan.notes[0].startswith("bundle: no eager baseline (bundle ")


def test_unknown_names_and_missing_engines_are_refused(models: Path, tmp_path: Path) -> None:
    base, bundle = str(models / "base"), str(engine_models() / "bundle")
    with pytest.raises(InputError, match="target 'teapot' is unknown: choose one of onnxruntime"):
        make_plan([base], wish(tmp_path, "teapot"))
    with pytest.raises(ModelError, match=r"model '.*nothing' does not exist"):
        make_plan([str(models / "nothing")], wish(tmp_path, "eager"))
    with pytest.raises(BundleError, match=r"has no openvino engine for unet .*sdkd build-engine .* --target openvino"):
        make_plan([bundle], wish(tmp_path, "openvino"))
    for target in ("eager-int4", "compile-int4"):
        with pytest.raises(InputError, match="precision 'int4' is unknown"):
            check_targets((target,))


@pytest.mark.skipif(availability("tensorrt").can_run, reason="TensorRT runs here")
def test_a_target_that_was_asked_for_must_run_here() -> None:
    with pytest.raises(EngineError, match=r"target 'tensorrt' does not run here: .*(pip install|NVIDIA GPU)"):
        check_targets(("eager", "tensorrt"))


def test_optimum_is_refused_where_it_cannot_be_imported_and_takes_the_onnx_files_of_a_bundle(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if peer_problem(PEERS["optimum"]) is not None:
        with pytest.raises(EngineError, match=r"target 'optimum' does not run here: optimum.onnxruntime cannot be "
                           r"imported \(.*pip install 'sdkd\[opt"):  # fmt: skip
            check_targets(("eager", "optimum"))
    monkeypatch.setattr(refusals, "peer_problem", lambda peer: None)
    bundle = engine_models() / "bundle"
    row = make_plan([str(bundle)], wish(tmp_path, "eager", "optimum")).subjects[1]
    assert (row.label, row.target, row.precision, row.bundle) == ("bundle optimum", "optimum", "fp32", bundle)
    assert row.has_engines is False
    assert size_on_disk(row) == sum(file.stat().st_size for file in bundle.glob("*/model.onnx*"))


def test_engines_are_built_for_the_size_and_batch(tmp_path: Path) -> None:
    assert str(_ranges(Wish(None, None, (64, 64), tmp_path, 3))) == "batch 3, height 64 px, width 64 px, 77 tokens"
    assert _ranges(Wish(None, None, None, tmp_path, 4)) is None  # a bundle's usual ones; 5 is refused: the command line
