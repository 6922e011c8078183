"""The report of a CUDA machine: every piece on a CPU with tiny models, its runner, and the page made from it."""

from __future__ import annotations

import json
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
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
from bench_kit import runner
from bench_kit.record import Record
from bench_kit.runner import Piece, Place
from gpu_bench import bundles, page, unets, wholes
from gpu_bench.bench import Bench
from gpu_bench.goals import goals
from gpu_bench.settings import ENGINES, KINDS, Settings, all_pieces, chosen, dry

SIZE = 32  # pixels of the small pipeline
SHAPES = [(2, SIZE), (2, 2 * SIZE)]
CEILINGS = {"what": "ceilings", "precision": "fp32", "flops_per_s": 9e10, "bytes_per_s": 2e10, "how": "product"}
BLANK: dict[str, Any] = {"state": "done", "errors": {}, "facts": {}}


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
        "models": models, "work": str(home / "work"), "sizes": (SIZE, 2 * SIZE), "batches": (2,), "seconds": 0.01,
        "runs": 2,
    })  # fmt: skip


@pytest.fixture(scope="module")
def pieces(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What every piece that needs no GPU found, as a report holds it: run as a child runs it, but in this process."""
    folder, found = tmp_path_factory.mktemp("pieces"), {"ceilings": {**BLANK, "rows": [dict(CEILINGS)]}}
    kinds = ("eager", "onnxruntime", "tensorrt-rtx", "images", "vae", "lora", "compile", "train")
    for piece in [one for one in all_pieces(settings) if one.name in {f"{kind}/tiny" for kind in kinds}]:
        write_json(folder / "piece", {"function": piece.function, "arguments": dict(piece.arguments)})
        runner.child(folder / "piece", folder / "result")
        found[piece.name] = {**read_json(folder / "result"), "state": "done", "commit": "abc1234"}
    return found


def rows(piece: dict[str, Any], what: str) -> list[dict[str, Any]]:
    return [row for row in piece["rows"] if row["what"] == what]


# What the pieces find


def steps_of(piece: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(row["way"], row["batch"], row["size"]) for row in rows(piece, "UNet step")]


def test_eager_steps_at_all_shapes(pieces: dict[str, Any]) -> None:
    found = pieces["eager/tiny"]
    assert found["errors"] == {}
    way = "eager, channels_last"
    assert steps_of(found) == [("eager", 2, SIZE), *((way, *shape) for shape in SHAPES)]
    for row in rows(found, "UNet step"):
        assert len(row["seconds"]) in (1, 2)
        assert row["work"]["flops"] > row["batch"] * 1e6
    (parity,) = rows(found, "parity")
    assert max(parity["errors"]) < 1e-5
    (queued,) = rows(found, "queued")
    assert (queued["way"], queued["batch"]) == (way, 2)
    assert 0.1 < queued["median_s"] / rows(found, "UNet step")[1]["median_s"] < 10  # of one call, not of ten
    assert "SDPA" in found["facts"]["attention"]


def test_engines_are_built_run_and_compared(pieces: dict[str, Any]) -> None:
    found = pieces["onnxruntime/tiny"]
    assert found["errors"] == {}
    assert "export_s" not in found["facts"]  # the bundle was there
    assert found["facts"]["engine_bytes"] > 10_000
    assert steps_of(found) == [("onnxruntime", *shape) for shape in SHAPES]
    assert all(row["load_s"] > 0 and row["first_call_s"] > 0 for row in rows(found, "UNet step"))
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
    eager = "eager, channels_last"
    decoded = [row["way"] for row in rows(pieces["vae/tiny"], "VAE decode")]
    assert decoded == [eager, eager, "onnxruntime", "onnxruntime"]
    parity = {(row["component"], row["way"]): max(row["errors"]) for row in rows(pieces["vae/tiny"], "parity")}
    assert list(parity) == [
        ("text_encoder", "eager"), ("vae_decoder", eager), ("text_encoder", "onnxruntime"),
        ("vae_decoder", "onnxruntime"),
    ]  # fmt: skip
    assert max(parity.values()) < 1e-4
    for name in ("images/tiny", "vae/tiny"):
        built = pieces[name]["facts"]["builds"]
        assert {"onnxruntime/text_encoder", "onnxruntime/vae_decoder"} <= set(built)
        assert all(one["engine_bytes"] > 1000 for one in built.values())
    assert steps_of(pieces["compile/tiny"]) == [("compile, eager", *shape) for shape in SHAPES]
    ways = [f"compile, eager, batch {batch}, {size} px" for batch, size in SHAPES]
    assert list(pieces["compile/tiny"]["facts"]["compile_s"]) == ways
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
    found = {**head, "commit": "abc1234", "settings": settings.public(), "environment": environment, "pieces": pieces}
    page.add_limits(found)
    return found


def test_every_row_with_work_has_its_limit_and_the_page_shows_all(pieces: dict[str, Any], settings: Settings) -> None:
    found = report_of(pieces, settings)
    limits = [row["limit"] for piece in pieces.values() for row in piece["rows"] if "work" in row]
    assert len(limits) >= 12
    assert all(limit["fraction"] > 0 and limit["bound"] in ("compute", "memory") for limit in limits)
    lines = page.page(found)
    assert "**A dry run: tiny models on a CPU, few calls. No figure here is a measurement.**" in lines
    titles = {"The machine's limits", "UNet steps", "Calls in a row", "Engines", "Distance to eager float32",
              "Whole images, and the VAE", "LoRA", "Distillation steps", "Goals"}  # fmt: skip
    assert titles <= {line.removeprefix("## ") for line in lines}
    assert lines == page.page(json.loads(json.dumps(found)))
    assert [line for line in lines if "nan" in line.split("|")] == []


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
    bench, record = Bench(settings, Record(), "tensorrt-rtx", "tiny"), Record()
    bench.settings, bench.record = on_gpu, record
    unets.engine(bench)  # the first model, too
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
    checked = SimpleNamespace(label="the onnxruntime engine of unet")
    session = SimpleNamespace(device=torch.device("cpu"), checked=checked, slot="onnxruntime")
    Bench(settings, Record(), "eager", "tiny").check_place([session])
    elsewhere = Bench(replace(settings, device="meta"), Record(), "eager", "tiny")
    with pytest.raises(EngineError, match=r"^the onnxruntime engine of unet runs on cpu, and the report is of meta: "):
        elsewhere.check_place([session])


def test_a_rate_that_tensor_cores_cannot_have_is_no_ceiling(settings: Settings) -> None:
    ceiling = {**CEILINGS, "precision": "fp16", "flops_per_s": 9e12, "bytes_per_s": 2e12}
    step = {"what": "UNet step", "precision": "fp16", "median_s": 0.01, "work": {"flops": 10**12, "bytes": 10**9},
            "limit": {"of": "earlier ceilings"}}  # fmt: skip
    found = report_of({"ceilings": {**BLANK, "rows": [ceiling]}, "eager/tiny": {**BLANK, "rows": [step]}}, settings)
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
    found = wholes.decoding_work("fp32", vae, SIZE)
    counted = count_products(vae, torch.zeros(wholes.latent_shape(vae.config, SIZE)))
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
    given = all_pieces(settings)[0].arguments["settings"]
    assert Settings.from_json(json.loads(json.dumps(given))).shapes == settings.shapes
    assert settings.shapes == [(2, 512), (8, 512), (16, 512), (2, 768)]
    alone, every = bundles.profiles(settings, "unet")
    assert (alone.batch.max, alone.height.max) == (1, 512)
    assert (every.batch.max, every.batch.opt, every.height.min, every.height.max) == (8, 8, 512, 768)
    asked = gpu_report.parse(["--models", "a=demo", "--sizes", "64", "--batches", "2,4", "--steps", "3"])
    found = Settings.of(asked)
    assert (found.models, found.sizes, found.batches, found.steps) == ({"a": "demo"}, (64,), (2, 4), 3)
    with pytest.raises(InputError, match=r"models 'demo' are not understood: give LABEL=MODEL"):
        Settings.of(gpu_report.parse(["--models", "demo"]))


# The runner, with processes that need no torch


WRITE = "open(result, 'w').write(json.dumps({'rows': [{'what': 'row of ' + name}], 'facts': {}, 'errors': {}}))\n"


def planted(work: Path, code: str) -> Place:
    """Every piece is a Python process with this code, which has its `name`, and the file `result`."""
    head = "import json, os, sys, time\nfile, result = sys.argv[1:]\ngiven = json.load(open(file))['arguments']\n"
    head += "name = '/'.join(filter(None, (given['kind'], given['model'])))\n"
    start = [sys.executable, "-S", "-c", head + code]
    return Place(work, {}, lambda piece, result: [*start, str(piece), str(result)])


def run_planted(
    found: dict[str, Any], work: Path, code: str, names: str, *, seconds: float = 600.0, again: bool = False,
    missing: dict[str, str] | None = None, **limits: float,
) -> list[str]:  # fmt: skip
    """The states of some pieces, in the order in which they were saved."""
    saved = list[int]()
    asked = [replace(piece, **limits) for piece in chosen(Settings(work=str(work)), names)]
    runner.run_all(
        asked, planted(work, code), found, lambda: saved.append(len(found)), deadline=time.monotonic() + seconds,
        again=again, said={"commit": "abc1234"}, missing=missing or {},
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


def test_the_budget_stops_a_piece_and_begins_no_other(tmp_path: Path) -> None:
    code = WRITE + "import subprocess\nsubprocess.Popen(['sleep', '60'])\ntime.sleep(60)\n"
    found: dict[str, Any] = {}
    states = run_planted(found, tmp_path, code, "doctor,ceilings", seconds=2.0, cost=1.0)
    assert states == ["doctor: out of budget", "ceilings: not started"]
    assert found["doctor"]["rows"] == [{"what": "row of doctor"}]
    assert found["doctor"]["errors"]["process"] == "stopped after 2 s, at the end of the budget"
    order = [piece.name for piece in runner.to_run(chosen(Settings(), "doctor,ceilings"), found, again=False)]
    assert order == ["ceilings", "doctor"]  # what was never begun comes first


def test_a_piece_is_begun_when_its_cost_is_left_and_stopped_at_the_most_for_its_kind(tmp_path: Path) -> None:
    costs = {piece.name: (piece.cost, piece.cap) for piece in all_pieces(Settings())}
    assert (costs["tensorrt/tiny"], costs["compile/tiny"]) == ((240.0, 600.0), (240.0, 300.0))
    assert {piece.name: piece.cost for piece in all_pieces(dry({}))}["tensorrt/teacher"] == 24.0
    found: dict[str, Any] = {}
    states = run_planted(found, tmp_path, WRITE, "tensorrt/tiny,train/small,eager/tiny", seconds=100.0)
    assert states == ["eager/tiny: done", "tensorrt/tiny: not started", "train/small: done"]
    run_planted(found, tmp_path, WRITE + "time.sleep(60)\n", "ceilings", cap=1.0)
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


def test_a_piece_of_another_benchmark_runs_the_same_and_ends_it_when_it_fails(tmp_path: Path) -> None:
    place = Place(tmp_path, runner.python_path())
    with pytest.raises(SystemExit, match=r"(?s)Traceback .*error: slug: TypeError: slug\(\) got an unexpected"):
        runner.run_or_exit(Piece("slug", "bench_kit.results:slug", {"other": 1}), place)
    with pytest.raises(SystemExit, match=r"error: none: AttributeError: .*'nothing'"):
        runner.run_or_exit(Piece("none", "bench_kit.results:nothing"), place)


# The whole call


ENVIRONMENT = {"gpu": {"gpu": "Example GPU", "compute_capability": "9.0"}, "gpu_driver": "580.10", "cpu": "CPU"}


def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *words: str, driver: str = "580.10") -> Path:
    machine = {"environment": {**ENVIRONMENT, "gpu_driver": driver}, "name": "Example GPU", "missing": ["tensorrt"]}
    monkeypatch.setattr(gpu_report, "identify", lambda *_: machine)
    monkeypatch.setattr(gpu_report, "Place", lambda work, _: planted(work, WRITE))
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
    assert runner.python_path(site)["PYTHONPATH"].split(":")[0] == str(site)
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


def test_a_kind_has_a_function_and_words_for_its_figures() -> None:
    for kind in KINDS.values():
        module, _, name = kind.function.partition(":")
        assert callable(getattr(__import__(f"gpu_bench.{module}", fromlist=[name]), name))
    assert {piece.kind for piece in all_pieces(Settings())} == set(KINDS)
    assert [name for name, kind in KINDS.items() if not kind.words] == ["doctor"]
