"""The report of a CUDA machine: every piece on a CPU with tiny models, its runner, and the page made from it."""

from __future__ import annotations

import json
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_exports
import torch
from helpers import tiny_pipeline
from made_once import made_once

from engines.sessions import opening
from sdkd.compare.measure.limits import unet_work
from sdkd.core.files import read_json, write_json
from sdkd.errors import InputError
from sdkd.students.blocks import build_student
from sdkd.targets import gpu_trial, registry

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import gpu_report
from bench_kit import runner
from bench_kit.record import Record
from bench_kit.results import keep
from bench_kit.runner import Piece, Place
from gpu_bench import page, pieces
from gpu_bench.page import goals
from gpu_bench.settings import FIGURES, SECONDS, TARGETS, Settings, all_pieces, chosen, dry

SIZE = 64  # pixels


def small_report(home: Path) -> None:
    """What every piece finds that needs no GPU, as a report holds it: run as a child runs it, but in this process.

    Of a two-level model whose bundle is there already, and of a teacher of four levels to train from.
    """
    for name, pipe in (("tiny", small_exports.small_pipeline()), ("teacher", tiny_pipeline())):
        pipe.save_pretrained(home / name)
    small_exports.bundle_copy(home / "work" / "tiny-fp32")
    models = {"tiny": str(home / "tiny"), "teacher": str(home / "teacher")}
    settings = dry({"models": models, "work": str(home / "work")})
    found: dict[str, Any] = {}
    for piece in chosen(settings, "compare/tiny,teacher-to-student,overhead,train/tiny,lora"):
        write_json(home / "piece", {"function": piece.function, "arguments": dict(piece.arguments)})
        runner.child(home / "piece", home / "result")
        found[piece.name] = {**read_json(home / "result"), "state": "done", "commit": "abc1234"}
    head = {"date": "2026-01-02", "machine": "example", "command": "python tools/gpu_report.py", "dry_run": True}
    environment = {"gpu": None, "cpu": "Example CPU"}
    report = {**head, "commit": "abc1234", "settings": settings.public(), "environment": environment, "pieces": found}
    write_json(home / "report.json", report)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    found: dict[str, Any] = read_json(made_once("gpu-report", small_report) / "report.json")
    return found


# What the pieces find


@pytest.mark.slow
def test_models_are_compared_on_what_runs_here(report: dict[str, Any]) -> None:
    alone, both = (report["pieces"][name] for name in ("compare/tiny", "teacher-to-student"))
    assert (alone["errors"], both["errors"]) == ({}, {})
    found = alone["facts"]["comparison"]
    assert [row["label"] for row in found["results"]] == ["tiny eager", "tiny inductor", "tiny onnxruntime"]
    assert (found["setup"]["size_px"], found["results"][0]["run"]["steps"], found["setup"]["batch"]) == (SIZE, 2, 1)
    engine = found["results"][1]
    assert (engine["verdict"]["ok"], set(engine["step_speedup"]), engine["limit"]["fraction"] > 0) == (
        True,
        {"eager"},
        True,
    )
    left = [note for note in found["notes"] if " was left out: " in note]
    assert [note.partition(" was")[0] for note in left] == ["tiny tensorrt", "tiny tensorrt-rtx"]
    built = {row["component"] for row in alone["facts"]["builds"] if row["made"] == "onnxruntime"}
    assert built == {"unet", "text_encoder", "vae_decoder", "vae_encoder"}
    results = both["facts"]["comparison"]["results"]
    assert [(row["label"], row["role"]) for row in results] == [
        ("teacher eager", "teacher"), ("tiny inductor", "student"), ("tiny onnxruntime", "student")
    ]  # fmt: skip
    assert set(results[1]["step_speedup"]) == {"teacher"}


@pytest.mark.slow
def test_the_runtime_is_measured_over_the_librarys_own_call(report: dict[str, Any]) -> None:
    found = report["pieces"]["overhead/tiny"]
    assert [(row["model"], row["slot"]) for row in found["rows"]] == [("tiny", "inductor"), ("tiny", "onnxruntime")]
    for row in found["rows"]:
        assert {name: len(values) for name, values in row["samples"].items()} == {"bare": 2, "runtime": 2, "loop": 2}
        assert min(row["bare_seconds"], row["runtime_seconds"]) > 0
    assert list(found["errors"]) == ["tensorrt", "tensorrt-rtx"]  # in their own words


@pytest.mark.slow
def test_a_lora_goes_on_and_comes_off_exactly(report: dict[str, Any]) -> None:
    rows = report["pieces"]["lora/tiny"]["rows"]
    assert [row["way"] for row in rows] == ["inductor, in place", "onnxruntime, rebuild"]
    for row in rows:
        assert (row["exact_back"], row["back"]) == (True, 0.0)
        assert row["weights"] > 0
        assert row["moved"] > 1e-4


@pytest.mark.slow
def test_a_students_steps_are_trained_and_held_against_the_limit(report: dict[str, Any]) -> None:
    found = report["pieces"]["train/tiny"]
    assert found["errors"] == {}
    assert [row["way"] for row in found["rows"]] == ["reference", "+ channels_last", "Trainer.step"]
    ceilings, pipe = found["facts"]["ceilings"], tiny_pipeline()
    side = SIZE // pipe.vae_scale_factor
    own, taught = (
        unet_work(dict(unet.config), 2, side, side).flops for unet in (build_student(pipe.unet, "tiny"), pipe.unet)
    )
    for row in found["rows"]:
        assert row["work"]["flops"] == taught + 3 * own  # backward is two forwards
        assert (row["student"], row["batch"], len(row["seconds_samples"])) == ("tiny", 2, 3)
        rate = row["work"]["flops"] / row["seconds_median"]
        assert row["limit"]["matrix_share"] == pytest.approx(rate / ceilings["flops_per_s"])


@pytest.mark.slow
def test_the_page_shows_all_and_is_made_of_the_json_alone(report: dict[str, Any]) -> None:
    lines = page.page(report)
    assert "**A dry run: tiny models on a CPU, few calls. No figure here is a measurement.**" in lines
    titles = {"Comparisons", "Exports and builds", "The runtime over the bare library", "LoRA", "Distillation steps",
              "Goals", "Missing, or failed"}  # fmt: skip
    assert {line.removeprefix("## ") for line in lines if line.startswith("## ")} == titles
    text = "\n".join(lines)
    assert text.count("- UNet step: Median of one UNet call") == 1  # of two comparisons
    assert "| onnxruntime, rebuild |" in text
    assert "| overhead/tiny | done | tensorrt: EngineError: " in text


def test_what_failed_and_what_was_noted_stands_in_every_comparison() -> None:
    shown = ["- **tiny tensorrt failed**: out of memory", "- Note: The machine was busy", "- UNet step: Median"]
    facts = {"markdown": "# tiny\n\n" + "\n".join(shown)}
    lines = page.comparisons({"pieces": {name: {"facts": facts} for name in ("compare/tiny", "compare/small")}})
    assert [lines.count(line) for line in shown] == [2, 2, 1]


def test_a_target_that_cannot_run_is_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ready = registry.Availability("tensorrt-rtx", "1.7", True, True, "ready", "")
    monkeypatch.setattr(registry, "availability", lambda _: ready)
    on_gpu = replace(dry({}), device="cuda")
    assert pieces.refused(on_gpu, "onnxruntime").startswith("it runs on cpu here, and the report is of cuda: ")
    monkeypatch.setattr(opening, "expected_device", lambda _: torch.device("cuda"))
    here = {"version": "1.7", "gpu": "Example GPU", "compute_capability": "9.0", "driver": "580.10"}
    monkeypatch.setattr(gpu_trial, "identity", lambda _: dict(here))
    failed = gpu_trial.Trial("tensorrt-rtx", "portable", "open", "unsupported cc", **here)  # type: ignore[arg-type]

    def tried(*trials: gpu_trial.Trial) -> tuple[str, tuple[str, ...]]:
        gpu_trial.remember(trials)
        options = pieces.build_options(on_gpu, "tensorrt-rtx")
        return pieces.refused(on_gpu, "tensorrt-rtx"), options.compute_capabilities

    assert "failed at 'open': unsupported cc" in tried(failed)[0]
    assert tried(failed, replace(failed, plan="current", step="ran")) == ("", ("current",))
    assert tried(replace(failed, step="ran")) == ("", ())
    refit = pieces.build_options(on_gpu, "tensorrt-rtx", refit="lora")  # which only one generation can have
    assert (refit.refit, refit.compute_capabilities) == ("lora", ("current",))
    assert pieces.build_options(dry({}), "tensorrt", refit="lora").compute_capabilities == ()


# Pieces, settings


def test_the_most_telling_pieces_come_first() -> None:
    every = all_pieces(Settings())
    assert [piece.name for piece in every] == [
        "doctor", "compare/tiny", "teacher-to-student", "train/small", "overhead/tiny", "compare/tiny-batch8",
        "compare/tiny@768", "train/tiny", "compare/teacher", "compare/small", "lora/tiny",
    ]  # fmt: skip
    assert all(callable(getattr(pieces, piece.function.partition(":")[2])) for piece in every)
    assert {piece.kind for piece in every} == set(SECONDS)
    assert set(FIGURES) == {*TARGETS, *SECONDS} - {"doctor", "compare"}
    given = {piece.name: piece.arguments for piece in every}
    assert given["compare/tiny"]["subjects"] == {"tiny": TARGETS}
    assert given["teacher-to-student"]["subjects"] == {"teacher": ("eager",), "tiny": TARGETS[2:]}
    assert (given["compare/tiny-batch8"]["batch"], given["compare/tiny@768"]["size"]) == (8, 768)
    assert [piece.name for piece in all_pieces(dry({"models": {"tiny": "demo"}}))] == [
        "doctor", "compare/tiny", "overhead/tiny", "compare/tiny-batch2", "lora/tiny"
    ]  # fmt: skip


def test_pieces_are_chosen_by_kind_or_name() -> None:
    names = [piece.name for piece in chosen(Settings(), "train, doctor,compare/small")]
    assert names == ["doctor", "train/small", "train/tiny", "compare/small"]
    assert chosen(Settings(), "") == all_pieces(Settings())
    with pytest.raises(InputError, match=r"piece 'compar' is unknown: choose from doctor, compare, teacher-to-student"):
        chosen(Settings(), "compar")


def test_settings_travel_and_profiles_hold_every_shape() -> None:
    settings = Settings()
    assert Settings.from_json(json.loads(json.dumps(all_pieces(settings)[0].arguments["given"]))) == settings
    alone, every = pieces.profiles(settings, "unet")
    assert (alone.batch.max, alone.height.max) == (1, 512)
    assert (every.batch.max, every.batch.opt, every.height.min, every.height.max) == (8, 8, 512, 768)
    asked = gpu_report.parse(["--models", "a=demo", "--sizes", "64", "--batches", "2,4", "--steps", "3"])
    found = Settings.of(asked)
    assert (found.models, found.sizes, found.batches, found.steps) == ({"a": "demo"}, (64,), (2, 4), 3)
    for words, said in (
        (("--models", "demo"), r"models 'demo' are not understood: give LABEL=MODEL"),
        (("--targets", "eager,tensort"), r"target 'tensort' is unknown here: choose from eager, compile"),
    ):
        with pytest.raises(InputError, match=said):
            Settings.of(gpu_report.parse(words))


# The runner, with processes that need no torch


WRITE = "open(result, 'w').write(json.dumps({'rows': [{'what': 'row of ' + name}], 'facts': {}, 'errors': {}}))\n"


def planted(work: Path, code: str) -> Place:
    """Every piece is a Python process with this code, which has its `name`, and the file `result`."""
    head = "import json, os, sys, time\nfile, result = sys.argv[1:]\n"
    head += "name = os.path.basename(file)[1:].removesuffix('.piece.json')\n"
    return Place(work, {}, [sys.executable, "-S", "-c", head + code])


def run_planted(
    found: dict[str, Any], work: Path, code: str, names: str, *, seconds: float = 600.0, again: bool = False,
    **limits: float,
) -> list[str]:  # fmt: skip
    """The states of some pieces, in the order in which they were saved."""
    saved = list[int]()
    asked = [replace(piece, **limits) for piece in chosen(Settings(work=str(work)), names)]
    runner.run_all(
        asked, planted(work, code), found, lambda: saved.append(len(found)), deadline=time.monotonic() + seconds,
        again=again, said={"commit": "abc1234"},
    )  # fmt: skip
    assert saved[-1] == len(found)
    return [f"{name}: {piece['state']}" for name, piece in found.items()]


def test_finished_pieces_are_kept_and_the_rest_goes_on_after_a_crash(tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    names = "doctor,compare/tiny,train/small"
    crash = WRITE + "if name == 'compare-tiny': os.abort()\n"
    assert run_planted(found, tmp_path, crash, names) == ["doctor: done", "compare/tiny: failed", "train/small: done"]
    assert found["compare/tiny"]["errors"]["process"].startswith("ended by SIGABRT")
    assert found["compare/tiny"]["rows"] == [{"what": "row of compare-tiny"}]  # written before the crash
    assert found["doctor"]["commit"] == "abc1234"
    before = found["doctor"]
    assert set(run_planted(found, tmp_path, WRITE, names)) == {
        "doctor: done",
        "compare/tiny: done",
        "train/small: done",
    }
    assert found["doctor"] is before
    states = run_planted(found, tmp_path, "raise RuntimeError('no such card')", "doctor", again=True)
    assert states[0] == "doctor: failed"
    assert "ended with status 1" in found["doctor"]["errors"]["process"]
    assert "RuntimeError: no such card" in found["doctor"]["errors"]["process"]
    assert found["doctor"]["rows"] == before["rows"]  # a later failure keeps them


def test_the_budget_stops_a_piece_and_begins_no_other(tmp_path: Path) -> None:
    late = WRITE.replace("row of", "late row of")
    code = f"{WRITE}import subprocess\nsubprocess.Popen(['sleep', '30'])\ntime.sleep(20)\n{late}"
    found: dict[str, Any] = {}
    states = run_planted(found, tmp_path, code, "doctor,train/small", seconds=2.0, cost=1.0)
    assert states == ["doctor: out of budget", "train/small: not started"]
    assert found["doctor"]["rows"] == [{"what": "row of doctor"}]
    assert found["doctor"]["errors"]["process"] == "stopped after 2 s, at the end of the budget"
    order = [piece.name for piece in runner.to_run(chosen(Settings(), "doctor,train/small"), found, again=False)]
    assert order == ["train/small", "doctor"]  # what was never begun comes first
    run_planted(found, tmp_path, code, "lora/tiny", cap=1.0)
    assert found["lora/tiny"]["errors"]["process"] == "stopped after 1 s, the most for its kind"


def test_a_piece_is_begun_when_its_cost_is_left(tmp_path: Path) -> None:
    costs = [(piece.cost, piece.cap) for settings in (Settings(), dry({})) for piece in chosen(settings, "compare")]
    assert (costs[0], costs[-1]) == ((200.0, 480.0), (20.0, 480.0))
    states = run_planted({}, tmp_path, WRITE, "compare/tiny,train/small", seconds=100.0)
    assert states == ["compare/tiny: not started", "train/small: done"]


def test_a_rerun_keeps_what_it_did_not_find_again() -> None:
    def row(way: str, seconds: float, **more: Any) -> dict[str, Any]:
        return {"what": "training step", "way": way, "batch": 2, "size": 512, "median_s": seconds, **more}

    before = {"rows": [row("eager", 1.0), row("other", 2.0)], "facts": {"a": 1, "b": 2}, "commit": "old"}
    found = runner.merged(before, {"rows": [row("eager", 3.0)], "facts": {"b": 3}, "errors": {}, "commit": "new"})
    assert found["rows"] == [row("eager", 3.0), row("other", 2.0, commit="old")]
    assert found["facts"] == {"a": 1, "b": 3}
    assert runner.merged(found, {"rows": [], "facts": {}, "commit": "newer"})["rows"] == [
        row("eager", 3.0, commit="new"), row("other", 2.0, commit="old")
    ]  # fmt: skip


def test_a_part_that_fails_is_recorded_and_the_next_goes_on(tmp_path: Path) -> None:
    record = Record(tmp_path / "result.json")
    with record.part("one"):
        raise ValueError("wrong")
    with record.part("two"):
        record.row(what="step", value=float("nan"), values=[1.0, float("inf")])
    found = read_json(tmp_path / "result.json")
    assert found["errors"] == {"one": "ValueError: wrong"}
    assert found["rows"] == [{"what": "step", "value": None, "values": [1.0, None]}]
    assert any("raise ValueError" in line for line in found["tracebacks"]["one"])


def test_a_result_bears_no_folder_of_this_machine(tmp_path: Path) -> None:
    assert runner.ended(-signal.SIGKILL, Path("nothing")) == "ended by SIGKILL"
    places = {"/home/me/work": "WORK", "/home/me": "~"}
    found = {"errors": {"a": "/home/me/work/x and /home/me/y"}, "rows": [{"n": 1}]}
    assert runner.scrubbed(found, places) == {"errors": {"a": "WORK/x and ~/y"}, "rows": [{"n": 1}]}
    with pytest.raises(SystemExit, match=r"the result holds paths of this machine .*: it was not written"):
        keep(tmp_path / "result.json", {"command": f"python {Path.home()}/tool.py"}, [])
    assert list(tmp_path.iterdir()) == []


def test_a_piece_of_another_benchmark_ends_it_when_it_fails(tmp_path: Path) -> None:
    place = Place(tmp_path, runner.python_path())
    with pytest.raises(SystemExit, match=r"(?s)Traceback .*error: slug: TypeError: slug\(\) got an unexpected"):
        runner.run_or_exit(Piece("slug", "bench_kit.results:slug", {"other": 1}), place)


# The whole call


ENVIRONMENT = {"gpu": {"gpu": "Example GPU", "compute_capability": "9.0"}, "gpu_driver": "580.10", "cpu": "CPU"}


def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *words: str, driver: str = "580.10") -> Path:
    machine = {"environment": {**ENVIRONMENT, "gpu_driver": driver}, "name": "Example GPU"}
    row = "{'what': 'row of ' + name, 'way': 'LoRA', 'on_s': 1.0, 'off_s': 1.0, 'exact_back': True}"
    monkeypatch.setattr(gpu_report, "identify", lambda *_: machine)
    monkeypatch.setattr(
        gpu_report, "Place", lambda work, _: planted(work, WRITE.replace("{'what': 'row of ' + name}", row))
    )
    gpu_report.main(["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--commit", "abc", *words])
    return max((tmp_path / "out" / "example-gpu").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)


def test_one_call_writes_json_and_page_and_the_next_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = call(tmp_path, monkeypatch, "--pieces", "doctor")
    assert path.with_suffix(".md").read_text().startswith("# Everything on Example GPU\n")
    first = read_json(path)
    assert (list(first["pieces"]), first["commit"], first["dry_run"]) == (["doctor"], "abc", False)
    assert first["command"] == "python tools/gpu_report.py --commit abc --pieces doctor"
    assert str(tmp_path) not in path.read_text()
    call(tmp_path, monkeypatch, "--pieces", "doctor,lora", "--commit", "def")
    again = read_json(path)
    assert again["pieces"]["doctor"] == first["pieces"]["doctor"]
    assert (list(again["pieces"]), again["commit"]) == (["doctor", "lora/tiny"], "abc, def")
    for number, words in ((2, ("--pieces", "doctor", "--steps", "9")), (3, ("--pieces", "doctor", "--seconds", "2"))):
        other = call(tmp_path, monkeypatch, *words)
        assert other.name == f"{path.stem}-{number}.json"  # other settings: a report of its own
    assert call(tmp_path, monkeypatch, "--pieces", "lora/tiny", "--steps", "9").name == f"{path.stem}-2.json"
    assert read_json(path)["pieces"] == again["pieces"]
    named = ("--out", str(path))
    with pytest.raises(SystemExit, match=r"was begun with another driver \(580\.10, here 590\.1\): give another --out"):
        call(tmp_path, monkeypatch, *named, driver="590.1")
    with pytest.raises(SystemExit, match=r"was begun with another settings"):
        call(tmp_path, monkeypatch, *named, "--steps", "9")


def test_a_report_goes_on_after_midnight_and_from_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    today = call(tmp_path, monkeypatch, "--pieces", "doctor,lora")
    earlier = today.with_name("2026-01-02.json")
    found = read_json(today)
    found["pieces"]["compare/tiny"] = {"state": "out of budget", "rows": [], "facts": {}, "errors": {}}
    write_json(earlier, {**found, "date": "2026-01-02"})
    today.unlink()
    for name, kept in (("compare/tiny", True), ("doctor", False)):  # what alone is wanted is unfinished, or done
        assert (gpu_report.place(earlier.parent, found, [name]) == earlier) is kept
    assert call(tmp_path, monkeypatch, "--pieces", "doctor") == earlier
    assert list(read_json(earlier)["pieces"]) == ["doctor", "lora/tiny", "compare/tiny"]
    copy = earlier.rename(tmp_path / "2026-01-02.json")
    words = ("--pieces", "compare/small", "--resume", str(copy))
    assert call(tmp_path, monkeypatch, *words) == earlier
    again = read_json(earlier)
    assert (list(again["pieces"])[-1], len(again["pieces"]), again["date"]) == ("compare/small", 4, "2026-01-02")
    assert "--resume" not in again["command"]
    with pytest.raises(SystemExit, match=r"begun with another driver \(580\.10, here 590\.1\): leave out --resume"):
        call(tmp_path, monkeypatch, *words, driver="590.1")


def test_wheels_are_installed_beside_everything(tmp_path: Path) -> None:
    kit, more = tmp_path / "kit", tmp_path / "more"
    kit.mkdir()
    more.mkdir()
    with pytest.raises(SystemExit, match=r"kit, .*more holds neither a kit\.json nor a wheel"):
        gpu_report.install([kit, more], tmp_path)
    (kit / "kit.json").write_text("{}")
    folder = "folder = pathlib.Path(sys.argv[1])\nfolder.mkdir()\n"
    write = f"import pathlib, sys\n{folder}(folder / 'said').write_text(str(sys.argv[2:]))\n"
    (kit / "install.py").write_text(write)
    site = gpu_report.install([more, kit], tmp_path)
    assert (site / "said").read_text() == str(["--from", str(more)])
    assert runner.python_path(site)["PYTHONPATH"].split(":")[0] == str(site)
    (kit / "install.py").write_text("raise SystemExit('a part is damaged')\n")
    assert gpu_report.install([kit], tmp_path) == site  # the same kit: nothing is done
    (kit / "kit.json").write_text("{ }")
    with pytest.raises(SystemExit, match=r"the wheels could not be installed: a part is damaged"):
        gpu_report.install([kit], tmp_path)
    assert not site.exists()


# Goals


def planted_goals(speed: float) -> dict[str, Any]:
    def compared(over: str, share: float, ratio: float) -> dict[str, Any]:
        def row(bundle: str | None, ratio: float) -> dict[str, Any]:
            return {"bundle": bundle, "step_speedup": {over: {"value": ratio}}, "limit": {"matrix_share": share}}

        return {"rows": [], "facts": {"comparison": {"results": [row("b", ratio), row("b", 1.5), row(None, 99.0)]}}}

    def trained(way: str, seconds: float, memory: float) -> dict[str, Any]:
        return {"student": "small", "way": way, "batch": 8, "seconds_median": seconds, "memory_gb": memory}

    added = [
        {"slot": slot, "overhead_seconds": [us / 1e6, 0, 1]} for slot, us in (("tensorrt", 30), ("onnxruntime", 900))
    ]
    found = {
        "compare/tiny": compared("eager", 0.1, speed), "compare/tiny-batch8": compared("eager", 0.55, 3.0),
        "teacher-to-student": compared("teacher", 0.1, 6.0), "overhead/tiny": {"rows": added, "facts": {}},
        "train/small": {"rows": [trained("reference", 3.0, 40.0), trained("Trainer.step", 1.0, 25.0)], "facts": {}},
    }  # fmt: skip
    return {"settings": {"batches": [1, 8]}, "pieces": found}


def test_goals_say_what_is_reached_and_what_is_missing() -> None:
    found = goals(planted_goals(2.5))
    assert [round(goal.value or 0, 6) for goal in found] == [2.5, 6.0, 0.55, 30.0, 3.0, 1.6]
    assert [goal.met for goal in found] == [True, True, True, True, True, False]
    assert found[-1].gap == "0.40x short"
    assert goals(planted_goals(2.0))[0].met is False
    assert {goal.value for goal in goals({"settings": {"batches": [1]}, "pieces": {}})} == {None}
