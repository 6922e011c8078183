"""Measure on this machine and keep the results: benchmarks/<machine>/<piece>.json and .md.

    python tools/bench.py                       # all of SD 1.5 and the demo; more than an hour on two CPU cores
    python tools/bench.py --pieces demo         # the embedded models: teacher and students, eager and engines
    python tools/bench.py --pieces sd15-tiny    # full-size SD 1.5 shapes with random weights: builds and latency
    python tools/bench.py --pieces sd15-small,sd15    # the same of the small student, and of the teacher
    python tools/bench.py --pieces vega-512,vega-1024   # SDXL's student Vega; an hour

Raw samples stay in the JSON. Run it on a quiet machine; `make benchmarks-page` puts it into docs and README.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_kit.comparison import builds_table, comparison_lines, keep_comparison
from bench_kit.record import Record
from bench_kit.results import ROOT, check_known, commit, keep, machine, parse, today
from bench_kit.runner import Piece, Place, python_path, run_or_exit

USUAL = ("demo", "sd15-tiny", "sd15-small", "sd15")  # all but the demo: full size, random weights
LARGE = 1024  # pixels from which a step takes a minute on two cores: fewer of them, and torch.compile is left out
SIZES = {"vega-512": ("vega", 512), "vega-1024": ("vega", LARGE)}  # of SDXL's smaller student, by the side in pixels
PIECES = (*USUAL, *SIZES)


def measure(record: Record, name: str, work: str) -> None:
    """A piece: its comparison, what was exported and built for it, and the comparison's page."""
    folder = Path(work, name)
    keep_comparison(record, demo(folder) if name == "demo" else full_size(name, folder), [folder])


def demo(folder: Path) -> Any:
    """The demo's comparison, with its distillation and builds from nothing."""
    from sdkd.core.console import progress
    from sdkd.demo.run import run_demo

    with progress("demo") as shown:
        return run_demo(folder, progress=shown).report


def full_size(name: str, folder: Path) -> Any:
    """A full-size model with random weights: build times and UNet step of every target that runs here."""
    from sdkd.compare import Subject, compare
    from sdkd.compare.measure.environment import load_average
    from sdkd.core.console import progress
    from sdkd.core.profiles import Range, ShapeRanges
    from sdkd.demo.run import wanted_engines
    from sdkd.targets.registry import availability
    from sdkd.workflow import prepare

    shapes, size = SIZES.get(name, (name, None))
    load, model, skipped = load_average(), f"random:{shapes}", dict[str, str]()
    ranges = None if size is None else ShapeRanges(*(Range.fixed(number) for number in (1, size, size, 77)))
    large = size == LARGE
    subjects = [Subject("eager fp32", model), *half_and_compiled(model, skipped, compiled=not large)]
    with progress(name) as shown:
        for engines in wanted_engines(skipped):
            if availability(engines.target.name).can_run:  # tools/bench_build.py builds the others
                made = prepare(model, engines, folder, ranges=ranges, progress=shown)
                label = f"{engines.target.name} {engines.precision}"
                subjects.append(Subject(label, model, made.slot, engines.precision, made.bundle))
        return compare(
            subjects, prompts=["a lighthouse in a storm"], size=size, steps=2, runs=3 if large else 6, image_runs=1,
            min_seconds=1, isolate=True, load_before=load, progress=shown,
            notes=[f"{left_out}: {why}" for left_out, why in skipped.items()],
        )  # fmt: skip


def half_and_compiled(model: str, skipped: dict[str, str], *, compiled: bool) -> Iterator[Any]:
    """Eager in bf16 where the CPU has units for it (minutes a step elsewhere), and torch.compile where it can work."""
    import torch

    from export.check.half_products import has_units
    from sdkd.compare import Subject
    from sdkd.compare.measure.subjects import COMPILE

    if has_units(torch.bfloat16):
        yield Subject("eager bf16", model, precision="bf16")
    else:
        skipped["eager bf16"] = "this CPU has no bf16 units"
    if not compiled:
        skipped["compile"] = f"left out at {LARGE} px, where it takes too long"
    elif shutil.which("g++"):
        yield Subject("compile fp32", model, COMPILE)
    else:
        skipped["compile"] = "no C++ compiler here"


def main() -> int:
    """Command line."""
    asked = parse(__doc__, pieces=",".join(USUAL), work=Path("artifacts/bench"))
    os.chdir(ROOT)  # paths in the results are relative to it
    names = asked.pieces.split(",")
    check_known("piece", names, PIECES)
    for name in names:
        command = f"python tools/bench.py --pieces {name}"
        piece = Piece(name, "bench:measure", {"name": name, "work": str(asked.work)})
        facts = run_or_exit(piece, Place(asked.work, python_path(), logged=False))["facts"]
        found = {"date": today(), "commit": commit(), "command": command, **facts}
        head = [f"# {name} on {machine()}", "", f"{found['date']}, commit {found['commit']}, `{command}`", ""]
        built = ["", "## Exports and builds", "", *builds_table(found["builds"])]
        keep(asked.output / machine() / f"{name}.json", found, [*comparison_lines(found["markdown"], head), *built])
    return 0


if __name__ == "__main__":
    sys.exit(main())
