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

from sdkd.core.files import read_json, write_json
from sdkd.errors import EngineError, InputError
from sdkd.targets import gpu_trial

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import gpu_report
from gpu_bench import bundles, page, parts, runner, unets
from gpu_bench.device import Device
from gpu_bench.goals import goals
from gpu_bench.record import Record
from gpu_bench.settings import ENGINES, Piece, Settings, all_pieces, cap, chosen, cost, dry

SIZE = 32  # pixels of the small pipeline


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A dry run of a two-level model, whose bundle is there already, and of a teacher of four levels to train from."""
    home = tmp_path_factory.mktemp("report")
    for name, pipe in (("tiny", small_exports.small_pipeline()), ("teacher", tiny_pipeline())):
        pipe.save_pretrained(home / name)
    (home / "work").mkdir()
    small_exports.bundle_copy(home / "work" / "tiny-fp32")
    models = {"tiny": str(home / "tiny"), "teacher": str(home / "teacher")}
    return dry({
        "models": models, "work": str(home / "work"), "sizes": (SIZE, 2 * SIZE), "seconds": 0.01, "runs": 2,
    })  # fmt: skip


def run(settings: Settings, name: str) -> dict[str, Any]:
    """One piece in this process."""
    record = Record()
    runner.run_piece(next(one for one in all_pieces(settings) if one.name == name), settings, record)
    return record.to_json()


@pytest.fixture(scope="module")
def pieces(settings: Settings) -> dict[str, dict[str, Any]]:
    """What every piece that needs no GPU found, as a report holds it."""
    names = ("ceilings", "eager/tiny", "onnxruntime/tiny", "tensorrt-rtx/tiny", "images/tiny", "vae/tiny", "lora/tiny",
             "compile/tiny", "train/tiny")  # fmt: skip
    return {name: {**run(settings, name), "state": "done", "commit": "abc1234"} for name in names}


def rows(piece: dict[str, Any], what: str) -> list[dict[str, Any]]:
    return [row for row in piece["rows"] if row["what"] == what]


# What the pieces find


def test_eager_steps_at_all_shapes(pieces: dict[str, Any]) -> None:
    found = pieces["eager/tiny"]
    assert found["errors"] == {}
    assert [(row["way"], row["batch"], row["size"]) for row in rows(found, "UNet step")] == [
        ("eager", 2, SIZE), ("eager, channels_last", 2, SIZE), ("eager, channels_last", 4, SIZE),
        ("eager, channels_last", 2, 2 * SIZE),
    ]  # fmt: skip
    for row in rows(found, "UNet step"):
        assert len(row["seconds"]) in (1, 2)
        assert row["work"]["flops"] > row["batch"] * 1e6
    (parity,) = rows(found, "parity")
    assert max(parity["errors"]) < 1e-5
    (queued,) = rows(found, "queued")
    assert (queued["way"], queued["batch"]) == ("eager, channels_last", 2)
    assert 0.1 < queued["median_s"] / rows(found, "UNet step")[1]["median_s"] < 10  # of one call, not of ten
    assert "SDPA" in found["facts"]["attention"]


def test_engines_are_built_run_and_compared(pieces: dict[str, Any]) -> None:
    found = pieces["onnxruntime/tiny"]
    assert found["errors"] == {}
    assert "export_s" not in found["facts"]  # the bundle was there
    assert found["facts"]["engine_bytes"] > 10_000
    steps = rows(found, "UNet step")
    assert [(row["batch"], row["size"]) for row in steps] == [(2, SIZE), (4, SIZE), (2, 2 * SIZE)]
    assert all(row["load_s"] > 0 and row["first_call_s"] > 0 for row in steps)
    assert max(rows(found, "parity")[0]["errors"]) < 1e-4


def test_what_cannot_run_is_recorded_in_its_own_words(pieces: dict[str, Any]) -> None:
    pytest.importorskip("tensorrt_rtx")
    found = pieces["tensorrt-rtx/tiny"]
    assert found["facts"]["engine_bytes"] > 10_000  # it is built
    assert rows(found, "UNet step") == []
    assert set(found["errors"]) == {"tensorrt-rtx, CUDA graphs", "tensorrt-rtx, no graphs"}
    assert all("needs an NVIDIA GPU" in text for text in found["errors"].values())


def test_images_vae_compile_and_training(pieces: dict[str, Any]) -> None:
    for name in ("images/tiny", "vae/tiny", "compile/tiny", "train/tiny"):
        assert pieces[name]["errors"] == {}, name
    assert [row["way"] for row in rows(pieces["images/tiny"], "image")] == ["eager", "onnxruntime"]
    assert [row["way"] for row in rows(pieces["vae/tiny"], "VAE decode")] == [
        *["eager, channels_last"] * 2, *["onnxruntime"] * 2
    ]  # fmt: skip
    parity = {(row["component"], row["way"]): max(row["errors"]) for row in rows(pieces["vae/tiny"], "parity")}
    assert list(parity) == [
        ("text_encoder", "eager"), ("vae_decoder", "eager, channels_last"), ("text_encoder", "onnxruntime"),
        ("vae_decoder", "onnxruntime"),
    ]  # fmt: skip
    assert max(parity.values()) < 1e-4
    for name in ("images/tiny", "vae/tiny"):
        built = pieces[name]["facts"]["builds"]
        assert {"onnxruntime/text_encoder", "onnxruntime/vae_decoder"} <= set(built)
        assert all(one["engine_bytes"] > 1000 for one in built.values())
    steps = rows(pieces["compile/tiny"], "UNet step")
    assert [(row["way"], row["batch"], row["size"]) for row in steps] == [
        ("compile, eager", batch, size) for batch, size in ((2, SIZE), (4, SIZE), (2, 2 * SIZE))
    ]  # fmt: skip
    assert list(pieces["compile/tiny"]["facts"]["compile_s"]) == [
        f"compile, eager, batch {batch}, {size} px" for batch, size in ((2, SIZE), (4, SIZE), (2, 2 * SIZE))
    ]  # fmt: skip
    steps = rows(pieces["train/tiny"], "training step")
    assert [row["way"] for row in steps] == ["reference", "+ channels_last", "Trainer.step"]
    assert {(row["student"], row["batch"], len(row["seconds"])) for row in steps} == {("tiny", 2, 3)}


def test_a_lora_goes_on_and_comes_off_exactly(pieces: dict[str, Any]) -> None:
    found = pieces["lora/tiny"]
    assert found["errors"] == {}
    assert found["facts"]["weights"] > 0
    (row,) = rows(found, "LoRA")
    assert row["moved"] > 1e-4
    assert row["exact_back"] is True
    assert len(row["seconds"]) == 2


def report_of(pieces: dict[str, Any], settings: Settings) -> dict[str, Any]:
    environment = {"gpu": None, "cpu": "Example CPU"}
    head = {"date": "2026-01-02", "machine": "example", "command": "python tools/gpu_report.py", "dry_run": True}
    found = {**head, "commit": "abc1234", "settings": settings.to_json(), "environment": environment, "pieces": pieces}
    page.add_limits(found)
    return found


def test_every_row_with_work_has_its_limit_and_the_page_shows_all(pieces: dict[str, Any], settings: Settings) -> None:
    found = report_of(pieces, settings)
    limits = [row["limit"] for piece in pieces.values() for row in piece["rows"] if "work" in row]
    assert len(limits) >= 12
    assert all(limit["fraction"] > 0 and limit["bound"] in ("compute", "memory") for limit in limits)
    text = page.markdown(found)
    assert "No figure here is a measurement" in text
    for title in ("The machine's limits", "UNet steps", "Engines", "Distance to eager float32",
                  "Whole images, and the VAE", "LoRA", "Distillation steps", "Goals"):  # fmt: skip
        assert f"\n## {title}\n" in text
    assert text == page.markdown(json.loads(json.dumps(found)))
    for line in text.splitlines():
        assert "nan" not in line.split("|")


def test_a_kind_that_a_trial_refused_is_measured_no_further(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = {"version": "1.7", "gpu": "Example GPU", "compute_capability": "9.0", "driver": "580.10"}
    monkeypatch.setattr(gpu_trial, "identity", lambda _: dict(here))
    on_gpu = replace(settings, device="cuda")
    failed = gpu_trial.Trial("tensorrt-rtx", "portable", "open", "unsupported cc", **here)  # type: ignore[arg-type]
    gpu_trial.remember([failed])
    assert bundles.refused(settings, "tensorrt-rtx") == ""  # the CPU of a dry run is asked nothing
    assert "failed at 'open': unsupported cc" in bundles.refused(on_gpu, "tensorrt-rtx")
    device, record = Device(settings), Record()
    unets.engine(on_gpu, device, record, "tiny", "tensorrt-rtx")  # the first model, too
    assert "failed at 'open': unsupported cc" in record.errors["export"]
    assert record.facts == {}  # nothing was exported or built
    gpu_trial.remember([failed, replace(failed, plan="current", step="ran")])
    assert bundles.refused(on_gpu, "tensorrt-rtx") == ""
    assert bundles.build_options(on_gpu, "tensorrt-rtx").compute_capabilities == ("current",)
    gpu_trial.remember([replace(failed, step="ran")])
    assert bundles.refused(on_gpu, "tensorrt-rtx") == ""
    assert bundles.build_options(on_gpu, "tensorrt-rtx").compute_capabilities == ()
    refit = bundles.build_options(on_gpu, "tensorrt-rtx", refit="lora")  # which only one generation can have
    assert (refit.refit, refit.compute_capabilities) == ("lora", ("current",))
    assert bundles.build_options(settings, "tensorrt", refit="lora").compute_capabilities == ()


def test_a_session_elsewhere_than_the_report_is_refused(settings: Settings) -> None:
    session = Place(torch.device("cpu"), Place("the onnxruntime engine of unet"), "onnxruntime")
    bundles.check_place([session], Device(settings))
    with pytest.raises(EngineError, match=r"^the onnxruntime engine of unet runs on cpu, and the report is of meta: "):
        bundles.check_place([session], Device(replace(settings, device="meta")))


class Place:
    """What a session says of where it is."""

    def __init__(self, device: Any, checked: Any = None, slot: str = "") -> None:
        self.device, self.checked, self.slot, self.label = device, checked, slot, device


def test_a_rate_that_tensor_cores_cannot_have_is_no_ceiling(pieces: dict[str, Any], settings: Settings) -> None:
    ceiling = {"what": "ceilings", "precision": "fp16", "flops_per_s": 9e12, "bytes_per_s": 2e12, "how": "product"}
    step = {"what": "UNet step", "precision": "fp16", "median_s": 0.01, "work": {"flops": 10**12, "bytes": 10**9},
            "limit": {"of": "earlier ceilings"}}  # fmt: skip
    blank = {"state": "done", "errors": {}, "facts": {}}
    found = report_of({"ceilings": {**blank, "rows": [ceiling]}, "eager/tiny": {**blank, "rows": [step]}}, settings)
    assert step["limit"]["fraction"] == pytest.approx(10**12 / 9e12 / 0.01)  # on a CPU it may be so
    found["environment"]["gpu"] = {"gpu": "Example GPU", "compute_capability": "9.0"}
    page.add_limits(found)
    assert "limit" not in step
    (row,) = page.not_measured(found)[2:]
    assert "| ceilings | not used: fp16 | a matrix rate of 9 TFLOP/s cannot be true of compute capability 9.0" in row
    ceiling["flops_per_s"] = 6e14
    page.add_limits(found)
    assert step["limit"]["matrix_share"] == pytest.approx(1 / 6)
    assert page.not_measured(found) == []


def test_the_work_of_decoding_is_counted_and_not_guessed() -> None:
    vae = small_exports.small_pipeline().vae
    found = parts.decoding_work(dry({}), vae, SIZE)
    counted = count_products(vae, torch.zeros(parts.latent_shape(vae.config, SIZE)))
    attention = 4 * (SIZE // 2) ** 4 * vae.config.block_out_channels[-1]  # both products, n x n x channels
    assert found["flops"] == counted + attention
    pixels, latents = 3 * SIZE**2, vae.config.latent_channels * (SIZE // 2) ** 2
    weights = sum(one.numel() for part in (vae.decoder, vae.post_quant_conv) for one in part.parameters())
    assert found["bytes"] == 4 * (weights + pixels + latents)


def count_products(vae: Any, latents: torch.Tensor) -> int:
    """FLOPs of all convolutions and linear layers, by their own shapes."""
    counts: list[int] = []

    def count(module: Any, _: Any, output: torch.Tensor) -> None:
        counts.append(2 * output.numel() * module.weight[0].numel())

    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    hooks = [one.register_forward_hook(count) for one in vae.modules() if isinstance(one, kinds)]
    with torch.inference_mode():
        vae.decode(latents)
    for hook in hooks:
        hook.remove()
    return sum(counts)


# Pieces, settings


def test_the_most_telling_pieces_come_first_and_every_target_has_one() -> None:
    names = [piece.name for piece in all_pieces(Settings())]
    assert names[:7] == [
        "doctor", "ceilings", "eager/tiny", "eager/teacher", "tensorrt-rtx/tiny", "tensorrt/tiny", "train/small"
    ]  # fmt: skip
    assert len(set(names)) == len(names)
    for model in ("tiny", "teacher", "small"):
        assert {f"{kind}/{model}" for kind in ("eager", "compile", "images", *ENGINES)} <= set(names)
    assert {"train/tiny", "train/small", "lora/tiny", "vae/tiny"} <= set(names)
    assert [piece.name for piece in all_pieces(dry({}))][:3] == ["doctor", "ceilings", "eager/teacher"]


def test_pieces_are_chosen_by_kind_or_name() -> None:
    assert [piece.name for piece in chosen(Settings(), "compile, doctor,train/small")] == [
        "doctor", "train/small", "compile/tiny", "compile/teacher", "compile/small"
    ]  # fmt: skip
    assert chosen(Settings(), "") == all_pieces(Settings())
    with pytest.raises(InputError, match=r"piece 'eagr' is unknown: choose from doctor, ceilings, eager"):
        chosen(Settings(), "eagr")


def test_settings_travel_and_profiles_hold_every_shape() -> None:
    settings = Settings(sizes=(512, 768), batches=(2, 8, 16))
    assert Settings.from_json(json.loads(json.dumps(settings.to_json()))).shapes == settings.shapes
    assert settings.shapes == [(2, 512), (8, 512), (16, 512), (2, 768)]
    alone, every = bundles.unet_profiles(settings)
    assert (alone.batch.max, alone.height.max) == (1, 512)
    assert (every.batch.max, every.batch.opt, every.height.min, every.height.max) == (8, 8, 512, 768)
    asked = gpu_report.parse(["--models", "a=demo", "--sizes", "64", "--batches", "2,4", "--steps", "3"])
    found = gpu_report.settings_of(asked)
    assert (found.models, found.sizes, found.batches, found.steps) == ({"a": "demo"}, (64,), (2, 4), 3)
    with pytest.raises(InputError, match=r"models 'demo' are not understood: give LABEL=MODEL"):
        gpu_report.settings_of(gpu_report.parse(["--models", "demo"]))


# The runner, with processes that need no torch


def planted(code: str) -> runner.Command:
    """Every piece is a Python process with this code, which has its name, and the files as `settings` and `result`."""
    head = "import json, os, sys, time\nname, settings, result = sys.argv[1:]\n"
    return lambda piece, settings, result: [sys.executable, "-c", head + code, piece.name, str(settings), str(result)]


WRITE = "open(result, 'w').write(json.dumps({'rows': [{'what': 'row of ' + name}], 'facts': {}, 'errors': {}}))\n"


def run_planted(
    found: dict[str, Any],
    work: Path,
    code: str,
    names: str,
    seconds: float = 600.0,
    again: bool = False,
    commit: str = "abc1234",
    **more: Any,
) -> list[str]:
    """The states of some pieces, in the order in which they were saved."""
    settings, saved = Settings(work=str(work)), list[int]()
    runner.run_all(
        chosen(settings, names), settings, found, lambda: saved.append(len(found)),
        deadline=time.monotonic() + seconds, again=again, said={"commit": commit}, environment={},
        words=planted(code), **more,
    )  # fmt: skip
    assert saved[-1] == len(found)
    return [f"{name}: {piece['state']}" for name, piece in found.items()]


def test_finished_pieces_are_kept_and_the_rest_goes_on_after_a_crash(tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    crash = WRITE + "if name == 'eager/tiny': os.abort()\n"
    states = run_planted(found, tmp_path, crash, "doctor,eager/tiny,ceilings")
    assert states == ["doctor: done", "ceilings: done", "eager/tiny: failed"]
    assert found["eager/tiny"]["errors"]["process"].startswith("ended by SIGABRT")
    assert found["eager/tiny"]["rows"] == [{"what": "row of eager/tiny"}]  # written before the crash
    assert found["doctor"]["commit"] == "abc1234"
    before = found["doctor"]
    states = run_planted(found, tmp_path, WRITE, "doctor,eager/tiny,ceilings")
    assert states == ["doctor: done", "ceilings: done", "eager/tiny: done"]
    assert found["doctor"] is before
    run_planted(found, tmp_path, WRITE, "doctor", again=True)
    assert found["doctor"] is not before


def test_an_error_is_the_librarys_own_and_a_later_failure_keeps_earlier_rows(tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    assert run_planted(found, tmp_path, WRITE, "ceilings") == ["ceilings: done"]
    states = run_planted(found, tmp_path, "raise RuntimeError('no such card')", "ceilings", again=True)
    assert states == ["ceilings: failed"]
    assert "ended with status 1" in found["ceilings"]["errors"]["process"]
    assert "RuntimeError: no such card" in found["ceilings"]["errors"]["process"]
    assert found["ceilings"]["rows"] == [{"what": "row of ceilings"}]


def test_the_budget_stops_a_piece_and_begins_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "cost", lambda *_: 1.0)
    code = WRITE + "import subprocess\nsubprocess.Popen(['sleep', '60'])\ntime.sleep(60)\n"
    found: dict[str, Any] = {}
    start = time.monotonic()
    states = run_planted(found, tmp_path, code, "doctor,ceilings", seconds=3.0)
    assert time.monotonic() - start < 30
    assert states == ["doctor: out of budget", "ceilings: not started"]
    assert found["doctor"]["rows"] == [{"what": "row of doctor"}]
    assert found["doctor"]["errors"]["process"] == "stopped after 3 s, at the end of the budget"
    order = [piece.name for piece in runner.to_run(chosen(Settings(), "doctor,ceilings"), found, again=False)]
    assert order == ["ceilings", "doctor"]  # what was never begun comes first


def test_a_piece_is_begun_when_its_cost_is_left_and_stopped_at_the_most_for_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (cost("tensorrt", Settings()), cap("tensorrt"), cap("compile")) == (240.0, 600.0, 300.0)
    assert cost("tensorrt", dry({})) == 24.0
    found: dict[str, Any] = {}
    states = run_planted(found, tmp_path, WRITE, "tensorrt/tiny,train/small,eager/tiny", seconds=100.0)
    assert states == ["eager/tiny: done", "tensorrt/tiny: not started", "train/small: done"]
    monkeypatch.setattr(runner, "cap", lambda _: 1.0)
    states = run_planted(found, tmp_path, WRITE + "time.sleep(60)\n", "ceilings")
    assert found["ceilings"]["state"] == "out of budget"
    assert found["ceilings"]["errors"]["process"] == "stopped after 1 s, the most for its kind"
    assert found["ceilings"]["rows"] == [{"what": "row of ceilings"}]


def test_a_kind_that_is_not_installed_needs_no_process(tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    missing = {"tensorrt": "tensorrt is not installed here"}
    states = run_planted(found, tmp_path, WRITE, "tensorrt/tiny,ceilings", missing=missing)
    assert states == ["ceilings: done", "tensorrt/tiny: not installed"]
    assert found["tensorrt/tiny"]["errors"] == {"package": "tensorrt is not installed here"}
    assert run_planted(found, tmp_path, WRITE, "tensorrt/tiny") == ["ceilings: done", "tensorrt/tiny: done"]


def test_a_rerun_keeps_what_it_did_not_find_again() -> None:
    def row(way: str, seconds: float, **more: Any) -> dict[str, Any]:
        return {"what": "UNet step", "way": way, "batch": 2, "size": 512, "median_s": seconds, **more}

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


def test_how_a_process_ended() -> None:
    assert runner.ended(-signal.SIGKILL, Path("nothing")) == "ended by SIGKILL"
    places = {"/home/me/work": "WORK", "/home/me": "~"}
    found = {"errors": {"a": "/home/me/work/x and /home/me/y"}, "rows": [{"n": 1}]}
    assert runner.scrubbed(found, places) == {"errors": {"a": "WORK/x and ~/y"}, "rows": [{"n": 1}]}


def test_a_child_runs_its_piece(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_bench.pieces.ceilings", lambda settings, device, record, model: record.row(what="here"))
    given = tmp_path / "settings.json"
    write_json(given, settings.to_json())
    assert gpu_report.main(["--child", "ceilings", str(given), str(tmp_path / "result.json")]) == 0
    found = read_json(tmp_path / "result.json")
    assert found["rows"] == [{"what": "here"}]
    assert found["errors"] == {}


# The whole call


ENVIRONMENT = {"gpu": {"gpu": "Example GPU", "compute_capability": "9.0"}, "gpu_driver": "580.10", "cpu": "CPU"}


def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *words: str, driver: str = "580.10") -> Path:
    machine = {"environment": {**ENVIRONMENT, "gpu_driver": driver}, "name": "Example GPU", "missing": ["tensorrt"]}
    monkeypatch.setattr(gpu_report, "identify", lambda *_: machine)
    defaults = {"missing": {}, "words": planted(WRITE)}
    monkeypatch.setattr(runner.run_all, "__kwdefaults__", defaults)
    gpu_report.main(["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--commit", "abc", *words])
    return max((tmp_path / "out" / "example-gpu").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)


def test_one_call_writes_json_and_page_and_the_next_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = call(tmp_path, monkeypatch, "--pieces", "doctor")
    assert path.with_suffix(".md").read_text().startswith("# Everything on Example GPU\n")
    first = read_json(path)
    assert (list(first["pieces"]), first["commit"], first["dry_run"]) == (["doctor"], "abc", False)
    assert first["command"] == "python tools/gpu_report.py --commit abc --pieces doctor"
    assert str(tmp_path) not in path.read_text()
    call(tmp_path, monkeypatch, "--pieces", "doctor,ceilings", "--commit", "def")
    again = read_json(path)
    assert again["pieces"]["doctor"] == first["pieces"]["doctor"]
    assert (list(again["pieces"]), again["commit"]) == (["doctor", "ceilings"], "abc, def")
    for number, words in ((2, ("--pieces", "doctor", "--steps", "9")), (3, ("--pieces", "doctor", "--seconds", "2"))):
        other = call(tmp_path, monkeypatch, *words)
        assert other.name == f"{path.stem}-{number}.json"  # other settings: a report of its own
    assert call(tmp_path, monkeypatch, "--pieces", "eager/tiny", "--steps", "9").name == f"{path.stem}-2.json"
    assert read_json(path)["pieces"] == again["pieces"]
    named = ("--out", str(path))
    with pytest.raises(SystemExit, match=r"was begun with another driver \(580\.10, here 590\.1\): give another --out"):
        call(tmp_path, monkeypatch, *named, driver="590.1")
    with pytest.raises(SystemExit, match=r"was begun with another settings"):
        call(tmp_path, monkeypatch, *named, "--steps", "9")


def test_a_report_goes_on_after_midnight_and_from_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    today = call(tmp_path, monkeypatch, "--pieces", "doctor,tensorrt/tiny")
    found = read_json(today)
    assert found["pieces"]["tensorrt/tiny"]["errors"] == {"package": "tensorrt is not installed here"}
    earlier = today.with_name("2026-01-02.json")
    write_json(earlier, {**found, "date": "2026-01-02"})
    today.unlink()
    assert call(tmp_path, monkeypatch, "--pieces", "ceilings") == earlier
    assert list(read_json(earlier)["pieces"]) == ["doctor", "tensorrt/tiny", "ceilings"]
    copy = earlier.rename(tmp_path / "2026-01-02.json")
    words = ("--pieces", "eager/tiny", "--resume", str(copy))
    assert call(tmp_path, monkeypatch, *words) == earlier
    again = read_json(earlier)
    assert (list(again["pieces"])[-1], len(again["pieces"]), again["date"]) == ("eager/tiny", 4, "2026-01-02")
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
    assert gpu_report.python_path(site)["PYTHONPATH"].split(":")[0] == str(site)
    (kit / "install.py").write_text("raise SystemExit('a part is damaged')\n")
    assert gpu_report.install([kit], tmp_path) == site  # the same kit: nothing is done
    (kit / "kit.json").write_text("{ }")
    with pytest.raises(SystemExit, match=r"the wheels could not be installed: a part is damaged"):
        gpu_report.install([kit], tmp_path)
    assert not site.exists()


# Goals


def planted_goals(engine_ms: float) -> dict[str, Any]:
    def step(way: str, ms: float, batch: int = 2, **more: Any) -> dict[str, Any]:
        return {"what": "UNet step", "way": way, "batch": batch, "size": 512, "median_s": ms / 1e3, **more}

    def trained(way: str, seconds: float, memory: float) -> dict[str, Any]:
        return {"what": "training step", "way": way, "batch": 8, "median_s": seconds, "memory_gb": memory}

    way = "tensorrt, CUDA graphs"
    tiny = [step(way, engine_ms), step(way, 20.0, 16, limit={"matrix_share": 0.55})]
    bare = {"what": "bare", "way": "tensorrt, bare replay", "median_s": (engine_ms - 0.03) / 1e3}
    rows = {
        "eager/tiny": [step("eager, channels_last", 10.0)], "eager/teacher": [step("eager, channels_last", 24.0)],
        "tensorrt/tiny": [*tiny, bare], "lora/tiny": [step("tensorrt, refit: before", 0.001)],
        "train/small": [trained("reference", 3.0, 40.0), trained("Trainer.step", 1.0, 25.0)],
    }  # fmt: skip
    settings = {"batches": [2, 8, 16], "sizes": [512, 768]}
    return {"settings": settings, "pieces": {name: {"rows": each} for name, each in rows.items()}}


def test_goals_say_what_is_reached_and_what_is_missing() -> None:
    found = goals(planted_goals(4.0))
    assert [round(goal.value or 0, 6) for goal in found] == [2.5, 6.0, 0.55, 30.0, 3.0, 1.6]
    assert [goal.met for goal in found] == [True, True, True, True, True, False]
    assert found[-1].gap == "0.40x short"
    assert goals(planted_goals(5.0))[0].met is False
    empty = goals({"settings": {"batches": [2], "sizes": [512]}, "pieces": {}})
    assert {goal.value for goal in empty} == {None}


def test_a_piece_has_a_function() -> None:
    for piece in all_pieces(Settings()):
        module, _, name = piece.function.partition(":")
        assert callable(getattr(__import__(f"gpu_bench.{module}", fromlist=[name]), name))
    assert Piece("eager", "tiny", "unets:eager").name == "eager/tiny"
