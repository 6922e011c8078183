"""Measure on this machine and keep the results: benchmarks/<machine>/<piece>.json and .md, and the table in README.md.

    python tools/bench.py                       # all pieces; more than an hour on two CPU cores
    python tools/bench.py --pieces demo         # the embedded models: teacher and students, eager and engines
    python tools/bench.py --pieces sd15-tiny    # full-size SD 1.5 shapes with random weights: builds and latency
    python tools/bench.py --pieces sd15-small,sd15    # the same of the small student, and of the teacher

Raw samples stay in the JSON. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdkd.bundle import Bundle
from sdkd.compare import Subject, compare
from sdkd.compare.environment import load_average
from sdkd.compare.report import Report
from sdkd.compare.subjects import COMPILE
from sdkd.compare.tables import markdown
from sdkd.console import progress
from sdkd.demo.run import DemoResult, wanted_engines
from sdkd.files import read_json, write_bytes, write_json
from sdkd.half_products import has_units
from sdkd.targets import availability, cpu_name, gpu
from sdkd.workflow import prepare

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
FULL_SIZE = ("sd15-tiny", "sd15-small", "sd15")  # random weights


def machine() -> str:
    """A folder name for this machine: its GPU, else its CPU and core count."""
    device = gpu()
    name = device["gpu"] if device else f"{cpu_name()} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """The commit that was measured."""
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return asked.stdout.strip()


def measure_demo(work: Path) -> dict[str, Any]:
    """The demo's comparison, with its distillation and builds from nothing."""
    from sdkd.demo.run import run_demo

    with progress("demo") as report:
        result = run_demo(work / "demo", progress=report)
    assert result.report is not None
    return _result(result.report, _builds(work.glob("demo/bundles/*/*/bundle.json")))


def measure_full_size(name: str, work: Path) -> dict[str, Any]:
    """A model of SD 1.5's shapes with random weights: build times and UNet step of every target that runs here."""
    load, model, plan = load_average(), f"random:{name}", DemoResult(work)
    subjects = [Subject("eager fp32", model), *_half_and_compiled(model, plan)]
    with progress(name) as report:
        for target, precision in wanted_engines(plan):
            if not availability(target).can_run:  # tools/bench_build.py builds those
                continue
            made = prepare(model, target, work / name, precision=precision, progress=report)
            subjects.append(Subject(f"{target} {precision}", model, made.slot, precision, made.bundle))
        found = compare(
            subjects,
            prompts=["a lighthouse in a storm"],
            steps=2,
            runs=6,
            image_runs=1,
            min_seconds=1,
            isolate=True,
            load_before=load,
            notes=[f"{left_out}: {why}" for left_out, why in plan.skipped.items()],
            progress=report,
        )
    return _result(found, _builds(work.glob(f"{name}/*/bundle.json")))


def _half_and_compiled(model: str, plan: DemoResult) -> list[Subject]:
    """Eager in bf16 where the CPU has units for it (minutes a step elsewhere), and torch.compile where it can work."""
    import torch

    found = []
    if has_units(torch.bfloat16):
        found.append(Subject("eager bf16", model, precision="bf16"))
    else:
        plan.skipped["eager bf16"] = "this CPU has no bf16 units"
    if shutil.which("g++"):
        found.append(Subject("compile fp32", model, COMPILE))
    else:
        plan.skipped["compile"] = "no C++ compiler here"
    return found


def _result(report: Report, builds: list[dict[str, Any]]) -> dict[str, Any]:
    return {"comparison": report.to_json(), "builds": builds, "markdown": markdown(report)}


def _builds(manifests: Any) -> list[dict[str, Any]]:
    rows = []
    for manifest in sorted(manifests):
        bundle = Bundle.open(manifest.parent)
        for part in bundle.manifest.components.values():
            rows.append(_row(bundle, part.name, f"onnx-{part.precision}", part.seconds, part.total_bytes))
        for engine in bundle.manifest.engines.values():
            rows.append(_row(bundle, engine.component, engine.slot, engine.seconds, engine.total_bytes))
    return rows


def _row(bundle: Bundle, component: str, made: str, seconds: float, size: int) -> dict[str, Any]:
    model = str(bundle.manifest.source.get("model", ""))
    model = model if ":" in model or model == "demo" else Path(model).name
    return {"model": model, "component": component, "made": made, "seconds": round(seconds, 2), "bytes": size}


def builds_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: what was exported and built, how long it took, how large it is."""
    lines = ["| model | component | made | seconds | MB |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['model']} | {row['component']} | {row['made']} | {row['seconds']:.1f} | {row['bytes'] / 1e6:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


PIECES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "demo": measure_demo,
    **{name: functools.partial(measure_full_size, name) for name in FULL_SIZE},
}


def keep(name: str, found: dict[str, Any]) -> None:
    """Write the JSON and the Markdown of one piece."""
    folder = ROOT / "benchmarks" / machine()
    command = f"python tools/bench.py --pieces {name}"
    head = {"date": datetime.date.today().isoformat(), "commit": commit(), "command": command}
    write_json(folder / f"{name}.json", head | found)
    title = f"# {name} on {machine()}\n\n{head['date']}, commit {head['commit']}, `{command}`\n\n"
    text = (
        title
        + found["markdown"].removeprefix("# ")
        + "\n\n## Exports and builds\n\n"
        + builds_table(found["builds"])
        + "\n"
    )
    write_bytes(folder / f"{name}.md", text.encode())


def brief(text: str) -> str:
    """The sentence, the machine and the first table of a comparison's Markdown, without its explanations."""
    lines = text.splitlines()
    return "\n".join([f"{lines[0].removeprefix('# ')}. {lines[2]}", "", *first_table(text)])


def first_table(text: str) -> list[str]:
    """The lines of the first table of a comparison's Markdown."""
    lines = text.splitlines()
    first = next(place for place, line in enumerate(lines) if line.startswith("|"))
    return list(itertools.takewhile(lambda line: line.startswith("|"), lines[first:]))


def readme_tables(folder: Path) -> list[str]:
    """Of one machine's kept pieces: the first table of each comparison, full-size models in one where columns agree."""
    kept = {path: data for path in sorted(folder.glob("*.json")) if "comparison" in (data := read_json(path))}
    full = [path for name in reversed(FULL_SIZE) if (path := folder / f"{name}.json") in kept]
    joined = len(full) > 1 and len({first_table(kept[path]["markdown"])[0] for path in full}) == 1
    tables = [_single(path, data) for path, data in kept.items() if not (joined and path in full)]
    return [*tables, _joined({path: kept[path] for path in full})] if joined else tables


def _link(path: Path) -> str:
    place = path.relative_to(path.parents[2]).as_posix()
    return f"[`{place}`]({place})"


def _single(path: Path, data: dict[str, Any]) -> str:
    origin = f"From {_link(path)} ({data['date']}), made by `{data['command']}`:"
    return f"{origin}\n\n{brief(data['markdown'])}"


def _joined(found: dict[Path, dict[str, Any]]) -> str:
    """One table of models that were each compared for themselves, so that ratios are within a model."""
    first = next(iter(found.values()))
    origins = [f"{_link(path)} ({data['date']}, commit {data['commit']})" for path, data in found.items()]
    setup, notes = first["comparison"]["setup"], [note for data in found.values() for note in left_out(data)]
    origin = (
        f"SD 1.5's shapes with random weights, {setup['size_px']} × {setup['size_px']} px, {setup['steps']} steps, "
        f"guidance {setup['guidance_scale']:g}. {first['markdown'].splitlines()[2]} Each model was compared for "
        f"itself, by `python tools/bench.py --pieces NAME`: {', '.join(origins)}."
    )
    head, rule, *_ = first_table(first["markdown"])
    rows = [f"| {path.stem} {line}" for path, data in found.items() for line in first_table(data["markdown"])[2:]]
    missing = ["", f"Left out: {'; '.join(dict.fromkeys(notes))}."] if notes else []
    return "\n".join([origin, "", f"| Model {head}", f"|---{rule}", *rows, *missing])


def left_out(data: dict[str, Any]) -> list[str]:
    """What a full-size comparison could not measure on its machine, and why."""
    return [note for note in data["comparison"]["notes"] if "random weights" not in note]


def update_readme() -> None:
    """Fill README's block with the tables of every kept piece."""
    folders = sorted(path for path in (ROOT / "benchmarks").iterdir() if path.is_dir())
    parts = [part for folder in folders for part in readme_tables(folder)]
    text = README.read_text(encoding="utf-8")
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    write_bytes(README, (text[:start] + "\n" + "\n\n".join(parts) + "\n" + text[end:]).encode())


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", default=",".join(PIECES), help=f"of {', '.join(PIECES)}")
    parser.add_argument("--work", type=Path, default=Path("artifacts/bench"), help="models and engines; re-used")
    args = parser.parse_args()
    os.chdir(ROOT)  # paths in the results are relative to it
    for name in args.pieces.split(","):
        if name not in PIECES:
            parser.error(f"piece {name!r} is unknown: choose from {', '.join(PIECES)}")
        keep(name, PIECES[name](args.work))
    update_readme()
    return 0


if __name__ == "__main__":
    sys.exit(main())
