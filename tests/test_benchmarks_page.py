"""The page of results and the table of the README: current, and made of nothing but the files."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from planted_report import ENVIRONMENT, planted_report

from sdkd.compare.report.tables import markdown
from sdkd.core.files import write_json
from sdkd.errors import InputError

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import bench_build
import bench_export
import bench_runtime
import benchmarks_page
from bench_kit.commands import Measured
from bench_kit.overhead import overhead_row
from gpu_bench.settings import FIGURES

ROOT = Path(__file__).parent.parent
HEAD = {
    "schema": 1, "machine": "example-2-cores", "date": "2026-01-02", "commit": "abc1234", "environment": ENVIRONMENT,
}  # fmt: skip
GPU = ENVIRONMENT | {"gpu": {"gpu": "Example GPU", "compute_capability": "9.0"}, "gpu_driver": "580.10", "cuda": "13.0"}
OPTIMUM = {"optimum-onnx": "0.1.0", "transformers": "4.57.1"}


def train_file(seconds: float = 2.5, environment: dict[str, Any] = ENVIRONMENT) -> dict[str, Any]:
    """A result of tools/bench_train.py."""
    rows = [
        {"step": step, "seconds_median": value, "images_per_second": 2 / value, "speedup": 5.0 / value,
         "speedup_low": 4.5 / value, "speedup_high": 5.5 / value, "memory_gb": None, "seconds_samples": [value] * 3}
        for step, value in (("reference", 5.0), ("Trainer.step", seconds))
    ]  # fmt: skip
    words = {"size": 256, "batch_size": 2, "precision": "bf16", "command": "python tools/bench_train.py"}
    return {**HEAD, **words, "environment": environment, "students": [{"student": "tiny", "rows": rows}]}


def comparison_file(environment: dict[str, Any] = ENVIRONMENT) -> dict[str, Any]:
    """A result of tools/bench.py."""
    report = planted_report(models=("teacher", "tiny"))
    builds = [
        {"model": "tiny", "component": name, "made": "onnx-fp32", "seconds": seconds, "bytes": size}
        for name, seconds, size in (("unet", 20.5, 5_000_000), ("vae_decoder", 4.25, 1_000_000))
    ]
    head = {"date": "2026-01-02", "commit": "abc1234", "command": "python tools/bench.py --pieces demo"}
    compared = report.to_json() | {"environment": environment}
    return {**head, "comparison": compared, "builds": builds, "markdown": markdown(report)}


def staircase_file() -> dict[str, Any]:
    """A result of tools/bench_staircase.py."""
    usual = {"vae_share": 0.12, "parameters": 4_790_000, "peak_bytes": 1_234_000_000, "to_first": None}
    first = {**usual, "label": "teacher", "change": "teacher, eager, 25 steps", "image_s": 265.0}
    ratio = {"value": 10.0, "low": None, "high": None, "tie": False}
    last = {**usual, "label": "few", "change": "4 steps", "image_s": 26.5, "over_previous": ratio}
    last |= {"over_first": ratio | {"low": 9.5, "high": 10.5}, "to_first": {"identical": False, "psnr_mean_db": 8.12}}
    steps = [first | {"over_previous": None, "over_first": None}, last]
    return comparison_file() | {"comparison": comparison_file()["comparison"] | {"staircase": steps}}


def serve_file() -> dict[str, Any]:
    """A result of tools/bench_serve.py."""
    load = {
        "clients": 20, "images_per_second": {"alone": 3.5, "together": 7.25}, "faster": [2.07, 1.9, 2.2],
        "latency_s": {"p50": 2.5, "p95": 4.0, "p99": 4.25},
        "alone_to_generate": {"images": 400, "identical": 400, "largest_difference": 0},
        "together_to_generate": {"images": 400, "identical": 399, "largest_difference": 1},
    }  # fmt: skip
    command = "python tools/bench_serve.py"
    return {**HEAD, "command": command, "about": "the demo's teacher on `openvino`", "pieces": {"load": load}}


def caching_file() -> dict[str, Any]:
    """A result of tools/bench_caching.py."""
    whole = {"subject": "demo eager", "interval": 1, "image_s": 0.5, "faster": None, "identical": None, "right": 0.98}
    cached = whole | {"interval": 3, "image_s": 0.25, "faster": [2.0, 1.9, 2.1], "identical": False, "right": 0.975}
    rows = [whole | {"psnr_mean_db": None}, cached | {"psnr_mean_db": 33.25}]
    return {**HEAD, "command": "python tools/bench_caching.py", "rows": rows}


def ran(seconds: float) -> dict[str, Any]:
    """A command's run."""
    return {"seconds": seconds, "peak_rss_bytes": 4 * 10**9, "peak_anonymous_bytes": 3 * 10**9, "passed": True}


def export_file() -> dict[str, Any]:
    """A result of tools/bench_export.py."""
    parts = {name: {"nodes": 1200, "opset": 23, "bytes": 7_000_000} for name in bench_export.COMPONENTS}
    ways = {
        way: Measured([ran(seconds) for _ in range(3)], parts)
        for way, seconds in (("optimum fp32", 90.0), ("sdkd fp32", 45.0))
    }
    words = {"rounds": 3, "command": "python tools/bench_export.py --rounds 3", "optimum": OPTIMUM}
    return {**HEAD, **words, "models": [{"model": "random:sd15-tiny", "rows": bench_export.rows(ways)}]}


def build_file() -> dict[str, Any]:
    """A result of tools/bench_build.py."""
    unet = {"export_seconds": 20.0, "build_seconds": 7.25, "engine_bytes": 9_000_000}
    written = {"engine_bytes": 9_000_000, "components": {"unet": unet}}
    nothing = {"engine_bytes": 0, "components": {}}
    rows = bench_build.rows({
        "openvino": Measured([ran(33.5)], written),
        "onnxruntime": Measured([ran(4.0) | {"refused": "the build needs 9 GB"}], nothing),
    })  # fmt: skip
    words: dict[str, Any] = {"rounds": 1, "command": "python tools/bench_build.py --rounds 1", "optimum": None}
    words |= {"size": "512", "batch": "1..4"}
    return {**HEAD, **words, "models": [{"model": "random:sd15-tiny", "rows": rows}]}


def runtime_file() -> dict[str, Any]:
    """A result of tools/bench_runtime.py."""
    samples = {"bare": [0.010, 0.011, 0.012], "runtime": [0.0102, 0.0113, 0.0121], "loop": [0.001, 0.0012, 0.0011]}
    words: dict[str, Any] = {"command": "python tools/bench_runtime.py --pieces overhead", "optimum": None}
    words |= {"settings": {"steps": 4, "size": 512}, "schema": bench_runtime.SCHEMA}
    rows = [overhead_row("demo", "onnxruntime", samples)]
    found = bench_runtime.merged({}, {**HEAD, **words}, "overhead", rows)
    images = [
        bench_runtime.image_row(image_result("student, eager fp32", 1.0), None),
        bench_runtime.image_row(image_result("student, onnxruntime", 2.0), 61.25),
    ]
    return bench_runtime.merged(found, {**HEAD, **words}, "onnxruntime", images)


def image_result(label: str, speed: float) -> dict[str, Any]:
    """A result of a comparison, so many times faster than its baseline."""
    found: dict[str, Any] = {name: {"median": 3100 / speed, "samples": [[3.0]]} for name in bench_runtime.TIMED}
    ratio = {"baseline": {"value": speed, "low": speed, "high": speed}} if speed > 1 else {}
    found |= {"image_s": {"median": 3.1 / speed, "samples": [[3.0]]}, "image_speedup": ratio, "step_speedup": ratio}
    return {**found, "label": label, "rest_ms": 8.0, "unet_calls": 4}


def test_pieces_of_a_runtime_result_are_measured_apart_and_of_one_setting(tmp_path: Path) -> None:
    found = runtime_file()
    assert set(found["runs"]) == {"overhead", "onnxruntime"}
    assert "overhead" in bench_runtime.merged(found, {**found, "commit": "def5678"}, "peer", [])
    other = bench_runtime.merged(found, {**HEAD, **found, "settings": {"steps": 8, "size": 512}}, "peer", [])
    assert "of 2026" not in "\n".join(bench_runtime.page(found)).lower()
    (added,), (base, engine) = found["overhead"], found["onnxruntime"]
    assert added["overhead_seconds"] == pytest.approx([2e-4, 1e-4, 3e-4])  # the median of the pairs' differences
    assert added["step_overhead_share"][0] == pytest.approx(1.2e-3 / 0.011)
    assert (base["image_faster"], base["unet_faster"]) == (None, None)
    assert (engine["unet_faster"], engine["seconds"], engine["outside_per_step_seconds"]) == ([2.0] * 3, 1.55, 0.002)
    assert set(other["runs"]) == {"peer"}


def gpu_report_file(pieces: Sequence[str], dry_run: bool = False) -> dict[str, Any]:
    """A result of tools/gpu_report.py: rows of some pieces, and a comparison of one target."""
    row = {"what": "LoRA", "way": "tensorrt, refit", "slot": "onnxruntime"}
    found: dict[str, Any] = {"state": "done", "rows": [row], "facts": {}, "errors": {}}
    engine = {"target": "tensorrt", "precision": "fp16", "bundle": "b", "step_speedup": {"eager": {"value": 3.0}}}
    settings = {"models": {"tiny": "random:sd15-tiny"}, "precision": "fp16", "sizes": [512], "batches": [1]}
    words = {"command": "python tools/gpu_report.py", "settings": settings, "dry_run": dry_run}
    every = {
        **dict.fromkeys(pieces, found),
        "compare/tiny": {"rows": [], "facts": {"comparison": {"results": [engine]}}},
    }
    return {**HEAD, **words, "environment": GPU, "pieces": every}


def test_a_dry_run_is_no_result(tmp_path: Path) -> None:
    found = {"2026-01-02": gpu_report_file(["lora/tiny"], dry_run=True)}
    with pytest.raises(InputError, match=r"a dry run of tools/gpu_report\.py measures nothing: keep it elsewhere"):
        benchmarks_page.whole_page(put(tmp_path, **found))


def put(root: Path, **files: dict[str, Any]) -> Path:
    """A folder with these results of one machine; a name's underscores are hyphens there."""
    for name, found in files.items():
        write_json(root / "benchmarks" / "example-2-cores" / f"{name.replace('_', '-')}.json", found)
    return root


def tables(text: str) -> list[str]:
    """Every table of a page."""
    return re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)


def test_the_committed_page_is_current() -> None:
    assert benchmarks_page.main(["--check"]) == 0


def test_the_committed_pages_show_every_machine_and_link_files_that_are_there() -> None:
    text = (ROOT / benchmarks_page.PAGE).read_text(encoding="utf-8")
    links = re.findall(r"\]\((\.\.[^)]*)\)", text)
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
    folders = {path.parent for path in (ROOT / "benchmarks").glob("*/*.json")}
    assert {f"## {folder.name}" for folder in folders} <= set(text.splitlines())
    assert [place for place in (ROOT, Path.home(), tempfile.gettempdir()) if str(place) in text] == []


def test_every_result_has_its_figures_device_date_commit_command_and_file(tmp_path: Path) -> None:
    put(tmp_path, demo=comparison_file(), train_256_tiny=train_file(), export=export_file(), build=build_file())
    put(tmp_path, staircase_sd15=staircase_file(), caching=caching_file(), serve=serve_file())
    text = benchmarks_page.whole_page(put(tmp_path, runtime=runtime_file()))
    section = text.split("\n## example-2-cores\n")[1].split("\n## Not measured on a GPU yet\n")[0]
    assert "Measured on: Example CPU @ 2.10GHz, 2 cores.\n" in section
    sources = [line for line in section.splitlines() if line.startswith("- [")]
    rule = r"- \[(.*)\]\(\.\./benchmarks/example-2-cores/\1\): 2026-01-02, commit abc1234, `python tools/bench.*`"
    assert [line for line in sources if not re.fullmatch(rule, line)] == []
    assert len(tables(section)) == len(sources) == 8
    assert "| caching | demo eager | 1 | 0.5 s | – | – | 98.0% |" in section
    served = "| serve | the demo's teacher on `openvino` | 20 clients | 7.25 | 2.07× (1.90–2.20) | 2.50, 4.00, 4.25 |"
    assert f"{served} 399 of 400, within 1 of 255 |" in section
    assert "| caching | demo eager | 3 | 0.25 s | 2.00× (1.90–2.10) | 33.2 dB | 97.5% |" in section
    assert "| build | random:sd15-tiny | openvino | 33.5 | 4.00 | 9 |" in section
    assert "| build | random:sd15-tiny | onnxruntime | refused | – | – |" in section
    assert "- `onnxruntime` refused: the build needs 9 GB" in bench_build.page({**HEAD, **build_file()})
    assert "| demo | tiny onnxruntime | 13.4 ms | 8.37 ms | 1.60× (1.59–1.63) | 55.3 dB |" in section
    assert "| export | random:sd15-tiny | sdkd fp32 | 45.0 | 4.00 | 28 |" in section
    assert "| runtime | student, eager fp32 | student, onnxruntime | 3.1 s | 1.6 s | 2.00× (2.00–2.00) |" in section
    step = "| staircase-sd15 | 4 steps | 26.5 s | 10.00× | 10.00× (9.50–10.50) | 12% | 1,234 | 4.8 | 8.1 dB |"
    assert step in section
    assert "| staircase-sd15 | teacher, eager, 25 steps | 265 s | – | – | 12% | 1,234 | 4.8 | – |" in section
    assert "| train-256-tiny | tiny | 0.400 images/s | 0.800 images/s | 2.00× (1.80–2.20) |" in section


def test_what_a_file_does_not_say_is_not_recorded(tmp_path: Path) -> None:
    found = json.loads((ROOT / "benchmarks" / "demo-teacher" / "accuracy.json").read_text(encoding="utf-8"))
    write_json(tmp_path / "benchmarks" / "demo-teacher" / "accuracy.json", found)
    text = benchmarks_page.whole_page(tmp_path)
    assert "Measured on: not recorded." in text
    assert ": date not recorded, commit not recorded, `python benchmarks/demo-teacher/measure.py`\n" in text


def test_the_readme_has_a_row_for_each_chosen_result_and_is_checked(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = tables(benchmarks_page.readme_block(ROOT))[0].splitlines()[2:]
    assert len(rows) == len(benchmarks_page.README_ROWS) + 1 == 5
    assert "\n".join(rows) in text
    (tmp_path / "README.md").write_text(text.replace("9,968 ms", "9,000 ms"), encoding="utf-8")
    assert benchmarks_page.texts(tmp_path)[tmp_path / "README.md"] == text


def test_a_changed_figure_changes_the_page_and_fails_the_check(tmp_path: Path) -> None:
    arguments = ["--root", str(put(tmp_path, train_256_tiny=train_file()))]
    assert benchmarks_page.main(arguments) == 0
    first = (tmp_path / benchmarks_page.PAGE).read_bytes()
    assert benchmarks_page.main([*arguments, "--check"]) == 0
    put(tmp_path, train_256_tiny=train_file(seconds=2.0))
    with pytest.raises(SystemExit, match=r"docs/benchmarks\.md is not .*: run `python tools/benchmarks_page\.py`"):
        benchmarks_page.main([*arguments, "--check"])
    assert (tmp_path / benchmarks_page.PAGE).read_bytes() == first
    assert benchmarks_page.main(arguments) == 0
    assert "| tiny | 0.400 images/s | 1.000 images/s | 2.50× " in (tmp_path / benchmarks_page.PAGE).read_text("utf-8")


def test_a_file_of_an_unknown_kind_is_refused_by_name(tmp_path: Path) -> None:
    put(tmp_path, train_256_tiny=train_file(), energy={"joules": 3})
    rule = (
        r"'benchmarks/example-2-cores/energy\.json' is of a kind .* add a row for it to KINDS in tools/benchmarks_page"
    )
    with pytest.raises(InputError, match=rule):
        benchmarks_page.whole_page(tmp_path)
    with pytest.raises(SystemExit, match=r"error: file 'benchmarks/example-2-cores/energy\.json'"):
        benchmarks_page.main(["--root", str(tmp_path)])
    assert not (tmp_path / benchmarks_page.PAGE).exists()


def test_a_file_that_lacks_a_figure_is_refused_by_name(tmp_path: Path) -> None:
    found = train_file()
    del found["students"][0]["rows"][1]["speedup_low"]
    put(tmp_path, train_256_tiny=found)
    with pytest.raises(InputError, match=r"'benchmarks/example-2-cores/train-256-tiny\.json' .*speedup_low"):
        benchmarks_page.whole_page(tmp_path)


def test_what_no_gpu_has_measured_is_listed(tmp_path: Path) -> None:
    text = benchmarks_page.whole_page(put(tmp_path, demo=comparison_file(), train_256_tiny=train_file()))
    listed = re.findall(r"^- `([\w-]+)`:", text.split("## Not measured on a GPU yet\n")[1], flags=re.MULTILINE)
    assert listed == list(FIGURES)
    assert (ROOT / benchmarks_page.GPU_COMMAND.removeprefix("python ")).is_file()


def test_what_a_gpu_has_measured_leaves_that_list(tmp_path: Path) -> None:
    put(tmp_path, demo=comparison_file(GPU), train_256_tiny=train_file(environment=GPU))
    report = gpu_report_file(("lora/tiny", "overhead/tiny"))
    text = benchmarks_page.whole_page(put(tmp_path, **{"2026-01-02": report}))
    assert "| 2026-01-02 | UNet step of tiny on its best target, over eager | at least 2.5x | 3.00x |" in text
    assert "Measured on: Example GPU, driver 580.10, CUDA 13.0, Example CPU @ 2.10GHz" in text
    listed = re.findall(r"^- `([\w-]+)`:", text.split("## Not measured on a GPU yet\n")[1], flags=re.MULTILINE)
    assert listed == ["compile", "inductor", "tensorrt-rtx", "teacher-to-student"]
