"""The staircase from an eager teacher to a few-step student with a small decoder on an engine: seconds of an image.

    python tools/bench_staircase.py                      # SD 1.5's shapes at 512 px; 25 minutes on two CPU cores
    python tools/bench_staircase.py --models demo        # the demo's models, of artifacts/demo: run `sdkd demo` first

Each row adds one change to the row above: the student's UNet, 4 unguided steps of LCMScheduler, the small decoder,
OpenVINO (bf16 where the CPU has units for it), and OpenVINO in int8, faster than that or not. SD 1.5 and its sd-tiny
have random weights: speed and memory count, images mean nothing; the few-step student has the student's weights, which
cost the same. Of the demo, `--few-steps` is a student that `sdkd distill --objective consistency` trained, and
`--captions` drawn shapes are asked for. Images of 20 s and more are made --image-runs times, the first of them among
these. Writes benchmarks/<machine>/staircase-<models>.json and .md. Run it on a quiet machine.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_kit.comparison import builds_table, comparison_lines, keep_comparison
from bench_kit.demo_models import drawn_captions
from bench_kit.record import Record
from bench_kit.results import ROOT, check_known, command_of, commit, keep, machine, parse, today
from bench_kit.runner import Piece, Place, python_path, run_or_exit

RUNS = 3  # UNet calls timed, at least


@dataclass(frozen=True)
class Models:
    """Whose images are drawn: names as `sdkd compare` takes them, and the size in pixels.

    `captions`: how many drawn shapes are asked for; 0: PROMPT alone.
    """

    teacher: str
    student: str
    vae: str
    size: int
    captions: int
    image_runs: int


PROMPT = "a lighthouse in a storm"
DEMO_STUDENT = "artifacts/demo/models/tiny"
SETS = {
    "sd15": Models("random:sd15", "random:sd15-tiny", "random:taesd", 512, 0, 1),
    "demo": Models("demo", DEMO_STUDENT, "demo", 64, 200, 5),
}


def series(models: Models, few: str, folder: Path, progress: Any) -> list[Any]:
    """The subjects, each with one change more than the one before; engines are built where they are missing."""
    from sdkd.compare import Subject
    from sdkd.core.profiles import Range, ShapeRanges
    from sdkd.models.generation import FEW_STEPS
    from sdkd.models.replacements import short_vae, with_vae
    from sdkd.models.resolve import resolve
    from sdkd.targets.plan import plan_for_model
    from sdkd.targets.registry import cpu_precisions
    from sdkd.workflow import prepare

    half = "bf16" if "bf16" in cpu_precisions() else "fp32"
    plans = [plan_for_model("openvino", precision) for precision in (half, "int8")]
    ranges = ShapeRanges(*(Range.fixed(number) for number in (1, models.size, models.size, 77)))
    source = with_vae(resolve(few), models.vae)
    engines = [(plan, prepare(source, plan, folder, ranges=ranges, progress=progress)) for plan in plans]
    run, vae, small = resolve(few).generation or FEW_STEPS, (("vae", models.vae),), short_vae(models.vae)
    name = f"student in {run.steps} step{'' if run.steps == 1 else 's'}"
    return [
        Subject("teacher eager", models.teacher, role="teacher"),
        Subject("student eager", models.student, role="student"),
        Subject(f"{name} eager", few, role="student", run=run),
        Subject(f"{name} with {small} eager", few, role="student", replaced=vae, run=run),
        *(
            Subject(
                f"{name} with {small} {made.slot}", few, made.slot, plan.precision, made.bundle, "student", vae, run=run
            )
            for plan, made in engines
        ),
    ]


def measure(record: Record, models: str, few_steps: str, image_runs: int, captions: int, work: str) -> None:
    """The staircase's comparison, and what was exported and built for it."""
    from sdkd.compare import compare
    from sdkd.compare.measure.defaults import default_guidance, default_judge
    from sdkd.compare.measure.environment import load_average
    from sdkd.core.console import progress

    load, asked, folder = load_average(), SETS[models], Path(work, models)
    names = [asked.teacher, asked.student]
    prompts = drawn_captions(captions) if captions else [PROMPT]
    with progress(f"staircase of {models}") as shown:
        subjects = series(asked, few_steps, folder, shown)
        report = compare(
            subjects, prompts=prompts, guidance_scale=default_guidance(names), size=asked.size, runs=RUNS,
            min_seconds=0.5, image_runs=image_runs, judge=default_judge(names, prompts, None), isolate=True,
            load_before=load, staircase=[subject.label for subject in subjects], progress=shown,
        )  # fmt: skip
    keep_comparison(record, report, [folder])


def main() -> None:
    """Measure and write."""
    asked = parse(
        __doc__, models="sd15", few_steps="", image_runs=0, captions=0, work=Path("artifacts/bench-staircase")
    )  # fmt: skip
    check_known("set of models", [asked.models], SETS)
    os.chdir(ROOT)  # paths in the results are relative to it
    asked.image_runs = asked.image_runs or SETS[asked.models].image_runs
    asked.captions = asked.captions or SETS[asked.models].captions
    asked.few_steps = asked.few_steps or SETS[asked.models].student
    given = {name: getattr(asked, name) for name in ("models", "few_steps", "image_runs", "captions")}
    piece = Piece(asked.models, "bench_staircase:measure", {**given, "work": str(asked.work)})
    facts = run_or_exit(piece, Place(asked.work, python_path(), logged=False))["facts"]
    command = command_of("bench_staircase.py", asked, *given)
    found = {"date": today(), "commit": commit(), "command": command, **facts}
    head = [f"# The staircase of {asked.models} on {machine()}", "", f"{found['date']}, commit {found['commit']}", ""]
    built = ["", "## Exports and builds", "", *builds_table(found["builds"])]
    path = asked.output / machine() / f"staircase-{asked.models}.json"
    keep(path, found, [*comparison_lines(found["markdown"], head), *built])


if __name__ == "__main__":
    main()
