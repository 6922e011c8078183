"""Measure on this machine and keep the results: benchmarks/<machine>/<piece>.json and .md.

    python tools/bench.py                       # all pieces; more than an hour on two CPU cores
    python tools/bench.py --pieces demo         # the embedded models: teacher and students, eager and engines
    python tools/bench.py --pieces sd15-tiny    # full-size SD 1.5 shapes with random weights: builds and latency
    python tools/bench.py --pieces sd15-small,sd15    # the same of the small student, and of the teacher

Raw samples stay in the JSON. Run it on a quiet machine; `make benchmarks-page` puts it into docs and README.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export.check.half_products import has_units
from sdkd.bundle.manifest import Bundle
from sdkd.compare import Subject, compare
from sdkd.compare.measure.environment import load_average
from sdkd.compare.measure.results import Report
from sdkd.compare.measure.subjects import COMPILE
from sdkd.compare.report.tables import markdown
from sdkd.core.console import progress
from sdkd.core.files import write_bytes, write_json
from sdkd.demo.run import DemoResult, wanted_engines
from sdkd.targets.registry import availability, cpu_name, gpu
from sdkd.workflow import prepare

ROOT = Path(__file__).parent.parent
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
        for engines in wanted_engines(plan):
            if not availability(engines.target.name).can_run:  # tools/bench_build.py builds those
                continue
            made = prepare(model, engines, work / name, progress=report)
            label = f"{engines.target.name} {engines.precision}"
            subjects.append(Subject(label, model, made.slot, engines.precision, made.bundle))
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
