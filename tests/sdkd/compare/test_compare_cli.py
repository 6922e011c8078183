"""`sdkd compare` as people call it."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from compare_faults import plant
from compare_models import engine_models
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import sdkd.compare.measure.runner as runner
from sdkd import cli
from sdkd.bundle.manifest import Bundle
from sdkd.compare.cli import make_again
from sdkd.compare.measure.timing import Timer

QUICK = ["--in-process", "--prompts", "a red star;a blue ring", "--steps", "2", "--runs", "3"]


def call(*words: str) -> Result:
    return CliRunner().invoke(cli.app, ["compare", *words])


class Clock:
    """A clock that moves by a millisecond when it is read, and by planted delays.

    Sleeping would prove the same on a quiet machine, and something else on a busy one.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now

    def delay(self, seed: int, slower: float = 1.0) -> Callable[[], object]:
        """A delay of 0.2 s, up to 5 % less or more at random, `slower` times as long."""
        noise = random.Random(seed)

        def wait() -> None:
            self.now += 0.2 * slower * noise.uniform(0.95, 1.05)

        return wait


def test_a_bundle_is_compared_with_its_model_and_a_planted_slowdown_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, labels = Clock(), ("bundle eager", "bundle onnxruntime")
    bundle, old, new = engine_models() / "bundle", tmp_path / "old", tmp_path / "new"
    monkeypatch.setattr(runner, "Timer", functools.partial(Timer, clock=clock, cpu_clock=clock))
    few = ("--in-process", "--prompts", "a red star;a blue ring", "--steps", "1", "--runs", "9", "--scheduler", "ddim")
    words = (str(bundle), *few, "--targets", "eager,onnxruntime")
    plant(monkeypatch, {label: clock.delay(seed) for seed, label in enumerate(labels)})
    result = call(*words, "--output", str(old))
    assert result.exit_code == 0, result.output
    assert re.search(r"bundle onnxruntime .* ✓ same images", result.stdout)
    assert f"Look at {old / 'report.html'}" in result.stdout.replace("\n", "")
    report = json.loads((old / "report.json").read_text())
    assert [row["label"] for row in report["results"]] == list(labels)
    assert (report["ok"], report["against"]) == (True, None)
    assert report["setup"]["batch"] == 1
    run = {"steps": 1, "guidance_scale": 4.0, "scheduler": "DDIMScheduler"}
    assert [row["run"] for row in report["results"]] == [run, run]
    again = shlex.split(report["command"])
    assert again[:3] == ["sdkd", "compare", str(bundle)]
    assert again[again.index("--prompts") + 1] == "a red star;a blue ring"
    assert again[again.index("--scheduler") + 1] == "ddim"

    plant(monkeypatch, {labels[0]: clock.delay(10), labels[1]: clock.delay(11, slower=1.2)})
    result = call(*words, "--output", str(new), "--against", str(old / "report.json"))
    assert result.exit_code == 1
    message = " ".join(result.stderr.split())
    assert "1 of 2 subjects is worse than in" in message
    assert "'bundle onnxruntime': a UNet step takes" in message
    changes = json.loads((new / "report.json").read_text())["against"]["subjects"]
    assert [(change["label"], change["verdict"]) for change in changes] == [(labels[0], "tie"), (labels[1], "slower")]
    assert changes[1]["step_speedup"]["value"] == pytest.approx(1 / 1.2, rel=0.04)
    assert "Against " in (new / "report.md").read_text()


def test_a_staircase_of_models_in_the_order_given(tmp_path: Path) -> None:
    models, words = [str(engine_models() / name) for name in ("wrong", "right")], ("--image-runs", "1", "--staircase")
    result = call(*models, *QUICK, *words, "--output", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [stair["label"] for stair in report["staircase"]] == ["wrong eager", "right eager"]
    assert [row["role"] for row in report["results"]] == ["teacher", "student"]
    assert report["results"][0]["image_s"]["count"] == 1
    assert report["command"].endswith(" --image-runs 1 --staircase --in-process")
    refused = call(*models, *QUICK, "--staircase", "--targets", "eager", "--output", str(tmp_path / "other"))
    assert "target 'eager' is no step of a staircase" in refused.stderr
    assert not (tmp_path / "other").exists()


def test_a_broken_rule_is_status_1_after_the_report(tmp_path: Path) -> None:
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
        (["--threshold", "inf"], "threshold inf is not finite: give a number of at least 0"),
        (["--baseline", "right"], "baseline 'right' is not among the subjects: choose one of right onnxruntime"),
        (["--scheduler", "dice"], "scheduler 'dice' is unknown"),
        (["--precision", "fp64"], "precision 'fp64' of an engine is unknown"),
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


def test_what_is_there_or_missing_is_one_message_before_any_work(tmp_path: Path) -> None:
    def refused(messages: str | tuple[str, ...], *words: str) -> None:
        result = call(*words)
        assert result.exit_code == 1
        for message in (messages,) if isinstance(messages, str) else messages:
            assert message in result.stderr

    bundle, out = engine_models() / "bundle", ("--output", str(tmp_path / "out"))
    refused("model 'no-such-model' does not exist", "no-such-model", *QUICK, *out)
    assert not (tmp_path / "out").exists()
    larger = (str(bundle), "--size", "64", "--batch", "2", *out)
    asked = "was asked for batch 2, height 64 px, width 64 px, and was built for batch 1, height 32 px"
    refused((asked, f"sdkd build-engine {bundle} --target onnxruntime --size 32..64 --batch 1..2"), *larger)
    (tmp_path / "report.json").write_text("{}")
    words = ("no-such-model", "--output", str(tmp_path))
    refused("already holds report.json, which sdkd did not write: choose another folder", *words, "--overwrite")
    (tmp_path / "report.json").write_text('{"schema": 3, "setup": {}, "environment": {}, "results": []}')
    refused("already holds report.json: choose another folder or pass --overwrite", *words)
    assert call("--steps", "0").exit_code == 2


def test_the_command_that_makes_it_again_spells_every_setting_out() -> None:
    options = {"targets": "eager", "precision": None, "prompts": "it's; red", "guidance_scale": 4.0, "batch": 2}
    assert make_again(["demo"], options) == (
        "sdkd compare demo --targets eager --prompts 'it'\"'\"'s; red' --guidance-scale 4 --batch 2"
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
