"""Whether a TensorRT kind runs on this GPU: the trial itself, what is remembered of it, and what an engine records."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import sdkd.commands.doctor
import sdkd.targets.gpu_trial as gpu_trial
from export.build.options import BuildOptions
from export.build.tensorrt_plan import _built_for
from sdkd.commands.doctor import doctor, gpu_support, try_target
from sdkd.core.child import ChildError
from sdkd.errors import InputError
from sdkd.targets.gpu_trial import Trial, attempt, plans, remember, remembered, runs_portably, support
from sdkd.targets.registry import availability

HERE = {"version": "1.7.1", "gpu": "Example GPU", "compute_capability": "9.0", "driver": "580.10"}
app = typer.Typer()
app.command()(doctor)


def trial(step: str = "ran", **changes: Any) -> Trial:
    return Trial(**({"target": "tensorrt-rtx", "plan": "portable", "step": step, "message": "", **HERE} | changes))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """A machine with a GPU that the library does not name, and empty caches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gpu_trial, "identity", lambda _: dict(HERE))
    return HERE


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_plan_is_built_and_the_librarys_words_are_kept() -> None:
    pytest.importorskip("tensorrt_rtx")
    found = Trial(**attempt("tensorrt-rtx"))
    assert (found.step, found.ran, found.gpu) == ("open", False, "")
    assert "cudaError 35" in found.message
    assert found.words().startswith("as sdkd builds it, failed at 'open': opening the plan")
    alone = Trial(**attempt("tensorrt-rtx", "current"))
    assert alone.step == "build"
    assert "cudaError 35" in alone.message


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_gpu_a_small_engine_tells_whether_a_target_runs_here(target: str) -> None:
    if not availability(target).version:
        pytest.skip(f"{target} is not installed")
    trials = try_target(target)
    assert [one.plan for one in trials] == list(plans(target))
    assert all(one.ran or one.message for one in trials)
    assert set(trials) <= set(remembered(target))
    (row,) = [one for one in gpu_support() if one.target == target]
    if row.named or target == "tensorrt":
        assert trials[0].ran, trials[0].message


def test_a_library_that_is_missing_is_the_first_step() -> None:
    if not availability("tensorrt").version:
        found = Trial(**attempt("tensorrt"))
        assert (found.step, found.version) == ("import", "")
        assert "pip install 'sdkd[tensorrt]'" in found.message
        assert plans("tensorrt") == ("portable",)


def test_what_a_library_names_is_known_and_what_it_does_not_is_to_be_measured() -> None:
    pytest.importorskip("tensorrt_rtx")
    named, other = support("tensorrt-rtx", "8.9"), support("tensorrt-rtx", "9.0")
    assert (named.named, other.named) == (True, False)
    assert "compute capability 8.9 is one that tensorrt_rtx" in named.known
    assert "and not 9.0" in other.known
    assert other.measured == "not measured: sdkd doctor --try finds out on such a GPU"
    answered = support("tensorrt-rtx", "9.0", [trial(), trial("open", plan="current", message="no such GPU")])
    assert answered.measured == (
        "as sdkd builds it, ran, values right; Example GPU (driver 580.10); "
        "built for this GPU alone, failed at 'open': no such GPU; Example GPU (driver 580.10)"
    )


def test_answers_are_remembered_for_this_gpu_driver_and_version(here: dict[str, str]) -> None:
    assert remembered("tensorrt-rtx") == ()
    others = [trial(driver="570.1"), trial(gpu="Other GPU"), trial(version="1.6"), trial(target="tensorrt")]
    remember([trial("open", message="no"), *others])
    assert remembered("tensorrt-rtx") == (trial("open", message="no"),)
    assert runs_portably("tensorrt-rtx") == ""
    remember([trial(), trial("open", plan="current"), trial(gpu="")])  # the later answer counts; none without a GPU
    assert set(remembered("tensorrt-rtx")) == {trial(), trial("open", plan="current")}
    assert runs_portably("tensorrt-rtx") == "9.0"
    for damaged in (
        '[{"of": "another version"}]',
        "[" * 100_000,
        "5",
        json.dumps([dataclasses.asdict(trial()) | {"step": []}]),
    ):
        gpu_trial._file().write_text(damaged)
        assert remembered("tensorrt-rtx") == ()


def test_an_engine_is_for_this_gpu_too_once_that_was_shown(here: dict[str, str]) -> None:
    library = pytest.importorskip("tensorrt_rtx")
    before = _built_for(library, "tensorrt-rtx", BuildOptions())
    assert "9.0" not in before
    remember([trial("open", message="unsupported"), trial(plan="current")])
    assert _built_for(library, "tensorrt-rtx", BuildOptions()) == before
    remember([trial()])
    assert _built_for(library, "tensorrt-rtx", BuildOptions()) == (*before, "9.0")
    assert _built_for(library, "tensorrt-rtx", BuildOptions(compute_capabilities=("8.9",))) == ("8.9",)
    assert _built_for(library, "tensorrt", BuildOptions()) == ()


def test_a_crash_is_an_answer(here: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise ChildError("the process was ended by SIGSEGV: the library crashed")

    monkeypatch.setattr("sdkd.core.child.run_in_child", crash)
    monkeypatch.setattr(sdkd.commands.doctor, "identity", lambda _: dict(HERE))
    found = try_target("tensorrt-rtx")
    assert {one.step for one in found} == {"crash"}
    assert found[0].message == "the process was ended by SIGSEGV: the library crashed"
    assert set(remembered("tensorrt-rtx")) == set(found)


def test_doctor_shows_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    runner = CliRunner()
    told = runner.invoke(app, ["--gpu", "9.0"], catch_exceptions=False).stdout
    assert "tensorrt-rtx on compute capability 9.0: tensorrt_rtx" in told
    assert "Not measured: sdkd doctor --try finds out on such a GPU." in told
    monkeypatch.setattr(
        sdkd.commands.doctor, "try_target", lambda name, _: [trial("open", message="[wrong]", target=name)]
    )
    found = json.loads(runner.invoke(app, ["--try", "--json"], catch_exceptions=False).stdout)
    assert {"target": "tensorrt-rtx", "step": "open"}.items() <= found["trials"][-1].items()
    assert Trial(**found["trials"][-1]) == dataclasses.replace(trial("open", message="[wrong]"))
    if not torch.cuda.is_available():
        assert found["gpu_support"] == []
        assert "failed at 'open': [wrong]" in runner.invoke(app, ["--try"], catch_exceptions=False).stdout
    with pytest.raises(InputError, match=r"compute capability 'hopper' is not understood: give one such as 9\.0"):
        runner.invoke(app, ["--gpu", "hopper"], catch_exceptions=False)
