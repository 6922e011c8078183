"""`sdkd compare` as people call it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from compare_models import engine_models
from typer.testing import CliRunner, Result

from sdkd import cli
from sdkd.compare.cli import make_again

QUICK = ["--in-process", "--prompts", "a red star;a blue ring", "--steps", "2", "--runs", "3"]


def call(*words: str) -> Result:
    return CliRunner().invoke(cli.app, ["compare", *words])


def test_a_bundle_is_compared_with_its_model(tmp_path: Path) -> None:
    bundle, output = engine_models() / "bundle", tmp_path / "out"
    result = call(str(bundle), *QUICK, "--targets", "eager,onnxruntime", "--output", str(output))
    assert result.exit_code == 0, result.output
    assert re.search(r"bundle onnxruntime .* ✓ same images", result.stdout)
    assert f"Look at {output / 'report.html'}" in result.stdout.replace("\n", "")
    report = json.loads((output / "report.json").read_text())
    assert [row["label"] for row in report["results"]] == ["bundle eager", "bundle onnxruntime"]
    assert report["ok"] is True
    words = shlex.split(report["command"])
    assert words[:3] == ["sdkd", "compare", str(bundle)]
    assert words[words.index("--prompts") + 1] == "a red star;a blue ring"


def test_a_broken_rule_is_status_1_after_the_report(tmp_path: Path) -> None:
    import dataclasses

    from sdkd.bundle.manifest import Bundle

    folder = engine_models()
    shutil.copytree(folder / "bundle", tmp_path / "bundle")
    opened = Bundle.open(tmp_path / "bundle")
    Bundle(opened.path, dataclasses.replace(opened.manifest, source={"model": str(folder / "wrong")})).save()
    output = tmp_path / "out"
    result = call(str(opened.path), *QUICK, "--json", "--output", str(output))
    assert result.exit_code == 1
    assert "1 of 2 subjects broke a rule. 'bundle onnxruntime': worst image" in result.stderr
    assert json.loads(result.stdout)["ok"] is False
    report = json.loads((output / "report.json").read_text())
    assert report["ok"] is False
    engine = report["results"][1]
    assert engine["verdict"]["ok"] is False
    assert engine["against_eager"]["psnr_mean_db"] < 40
    assert engine["against_eager"]["ssim_min"] <= engine["against_eager"]["ssim_mean"] < 0.9
    assert engine["limit"]["flops"] == report["results"][0]["limit"]["flops"] > 0
    assert "✗ differs" in next(
        line for line in (output / "report.md").read_text().splitlines() if line.startswith("| bundle onnxr")
    )
    page = " ".join((output / "report.html").read_text().split())
    assert "1 of 2 subjects broke a rule." in page
    assert '<h3>Furthest from own eager</h3><p class="sub">bundle onnxruntime, ' in page


def test_what_cannot_be_built_is_in_the_report_and_the_others_are_measured(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, bad, output = engine_models(), tmp_path / "bad", tmp_path / "out"
    shutil.copytree(folder / "right", bad)
    weights = bad / "unet" / "diffusion_pytorch_model.safetensors"  # exported first
    save_file({name: part / 0 for name, part in load_file(weights).items()}, weights)
    models = [str(bad), str(folder / "bundle")]
    words = [*models, *QUICK, "--targets", "onnxruntime", "--bundles", str(tmp_path / "bundles")]
    result = call(*words, "--output", str(output))
    assert result.exit_code == 1
    assert "sdkd: 1 of 2 subjects failed. 'bad onnxruntime': " in result.stderr
    assert f"See {output / 'report.html'}." in result.stderr
    assert "✗ bad onnxruntime failed: " in result.stdout.replace("\n", " ")
    report = json.loads((output / "report.json").read_text())
    assert [row["label"] for row in report["results"]] == ["bundle onnxruntime"]
    assert [row["label"] for row in report["failed"]] == ["bad onnxruntime"]
    assert report["failed"][0]["bundle"] == str(tmp_path / "bundles" / "bad" / "fp32")
    assert "weights are NaN or infinite in fp32 (first: " in report["failed"][0]["reason"]
    assert "\n" not in report["failed"][0]["reason"]
    assert "- **bad onnxruntime failed**: " in (output / "report.md").read_text()
    page = " ".join((output / "report.html").read_text().split())
    assert "1 of 2 subjects failed." in page
    assert "<b>bad onnxruntime</b>: " in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "1001"], "'right': steps 1001 is too large: give a whole number from 1 to 1000"),
        (["--size", "30"], "'right': height 30 is not a multiple of 4 pixels, as this model needs: use 28 or 32"),
        (["--batch", "5"], "batch 5 is outside 1..4, which engines are built for by default: give --size, too"),
        (["--seed", "-1"], "seed -1 is too small"),
        (["--threshold", "inf"], "threshold inf is below 0: give the share"),
        (["--baseline", "right"], "baseline 'right' is not among the subjects: choose one of right onnxruntime"),
        (["--scheduler", "dice"], "scheduler 'dice' is unknown"),
        (["--precision", "fp64"], "precision 'fp64' is unknown"),
        (["--targets", "onnxruntime", "--precision", "bf16"], "the ONNX graph is bf16, which onnxruntime cannot run"),
        (["--targets", "openvino,openvino-fp32"], "subject label 'right openvino' is used twice"),
    ],
)
def test_what_no_subject_can_do_is_refused_before_anything_is_built(
    words: list[str], message: str, tmp_path: Path
) -> None:
    usual = {"--targets": "onnxruntime", "--bundles": str(tmp_path / "bundles"), "--output": str(tmp_path / "out")}
    given = [word for name, value in usual.items() if name not in words for word in (name, value)]
    result = call(str(engine_models() / "right"), *given, *words)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not (tmp_path / "bundles").exists()


def test_engines_that_were_not_built_for_the_size_are_refused_with_the_command_that_builds_others(
    tmp_path: Path,
) -> None:
    bundle = engine_models() / "bundle"
    result = call(str(bundle), "--size", "64", "--batch", "2", "--output", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "onnxruntime engine of unet in" in result.stderr
    assert "was asked for batch 2, height 64 px, width 64 px, and was built for batch 1, height 32 px" in result.stderr
    assert f"sdkd build-engine {bundle} --target onnxruntime --size 32..64 --batch 1..2" in result.stderr


def test_a_report_that_is_there_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    result = call("no-such-model", "--output", str(tmp_path), "--overwrite")
    assert result.exit_code == 1
    assert "already holds report.json, which sdkd did not write: choose another folder" in result.stderr
    (tmp_path / "report.json").write_text('{"schema": 3, "setup": {}, "environment": {}, "results": []}')
    result = call("no-such-model", "--output", str(tmp_path))
    assert result.exit_code == 1
    assert "already holds report.json: choose another folder or pass --overwrite" in result.stderr


def test_bad_usage_is_status_2() -> None:
    assert call("--steps", "0").exit_code == 2


def test_a_missing_model_is_one_message(tmp_path: Path) -> None:
    result = call("no-such-model", *QUICK, "--output", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "model 'no-such-model' does not exist" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_that_makes_it_again_spells_every_setting_out() -> None:
    command = make_again(["demo"], "eager", None, ("it's; red",), 25, 4.0, None, 2, "dpm++", 0, 30, None)
    assert command == (
        "sdkd compare demo --targets eager --prompts 'it'\"'\"'s; red' --steps 25 --guidance-scale 4 --batch 2 "
        "--scheduler dpm++ --seed 0 --runs 30"
    )


def test_importing_loads_nothing_heavy() -> None:
    modules = "sdkd.compare.cli, sdkd.compare.measure.subjects, sdkd.compare.measure.results"
    code = f"import {modules}, sys; print(sorted({{'torch', 'diffusers', 'transformers', 'onnx'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_found_on_first_use() -> None:
    import sdkd.compare

    assert {name for name in sdkd.compare.__all__ if getattr(sdkd.compare, name)} == set(sdkd.compare.__all__)
    with pytest.raises(AttributeError, match=r"module 'sdkd.compare' has no attribute 'nothing'"):
        sdkd.compare.nothing  # noqa: B018
