"""What eight bits cost in quality: captions right, likeness of images, error by timestep, the most sensitive layers.

    python tools/bench_int8_quality.py                                     # the demo's teacher
    python tools/bench_int8_quality.py --models demo,artifacts/demo/models/tiny --captions 200

Every model in eager float32 and on int8 engines of --targets, on captions of drawn shapes, as each model is to be run.
Likeness is to the model's own eager float32 images. Engines are kept whether they are faster or not; speed is
bench_int8.py's matter. Writes benchmarks/<machine>/int8-quality.json and .md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_kit.demo_models import drawn_captions
from bench_kit.record import Record
from bench_kit.results import NONE, ROOT, command_of, commit, keep, machine, parse, today
from bench_kit.runner import Piece, Place, python_path, run_or_exit

from sdkd.core.console import markdown_table

SHOWN_LAYERS = 5  # of the sensitivities, the largest


def subjects_of(model: str, targets: Sequence[str], run: Any, size: int, folder: Path, progress: Any) -> list[Any]:
    """A model in eager float32 and on int8 engines; its bundle is made where it is missing."""
    from sdkd.compare import Subject
    from sdkd.core.profiles import Range, ShapeRanges
    from sdkd.models.resolve import resolve
    from sdkd.targets.plan import plan_for_model
    from sdkd.workflow import prepare

    name, ranges = Path(model).name, ShapeRanges(*(Range.fixed(number) for number in (1, size, size, 77)))
    found = [Subject(f"{name} eager", model, run=run)]
    for target in targets:
        plan = plan_for_model(target, "int8")
        made = prepare(resolve(model), plan, folder / name, ranges=ranges, progress=progress)
        found.append(Subject(f"{name} {made.slot}", model, made.slot, plan.precision, made.bundle, run=run))
    return found


def measure(record: Record, models: str, targets: str, captions: int, work: str) -> None:
    """The images of all subjects, and what their engines' records say."""
    from sdkd.compare import compare
    from sdkd.compare.measure.defaults import AS_MADE, default_judge, runs_of
    from sdkd.core.console import progress
    from sdkd.toyworld.scenes import IMAGE_SIZE

    names, prompts = models.split(","), drawn_captions(captions)
    runs, _ = runs_of(names, AS_MADE)
    with progress("int8 quality") as shown:
        every = [
            subject
            for model in names
            for subject in subjects_of(model, targets.split(","), runs[model], IMAGE_SIZE, Path(work), shown)
        ]
        report = compare(
            every, prompts=prompts, runs=1, min_seconds=0.0, image_runs=1, judge=default_judge(names, prompts, None),
            progress=shown,
        )  # fmt: skip
    for row in report.results:
        record.row(**_row(row, report))


def _row(row: Any, report: Any) -> dict[str, Any]:
    """One subject's result."""
    from sdkd.compare.measure.results import rounding_json

    close, judged = row.against_eager, row.judged
    return {
        "subject": row.subject.label, "run": str(row.run), "judged": judged,
        "right": None if judged is None else sum(judged.values()) / len(judged),
        "psnr_mean_db": close and close.psnr_mean_db, "psnr_min_db": close and close.psnr_min_db,
        "ssim_mean": close and close.ssim_mean, "per_image_psnr_db": close and [one.psnr_db for one in close.per_image],
        "verdict": row.verdict and row.verdict.found,
        "rounding": row.rounding and {**rounding_json(row.rounding), "sensitivity": dict(row.rounding.ranking)},
    }  # fmt: skip


def page(found: Mapping[str, Any]) -> Iterator[str]:
    """The tables for people."""
    rows = found["rows"]
    yield from (
        f"# What int8 costs in quality, on {found['machine']}",
        "",
        f"{found['date']}, commit {found['commit']}",
    )
    heads = ("subject", "drawn with", "captions right", "PSNR, dB", "worst", "SSIM")
    yield from ("", *markdown_table(heads, [_cells(row) for row in rows], left=2), "")
    yield "PSNR and SSIM are to the model's own eager float32 images; captions right: the mean of what is read in them."
    rounded = {row["subject"]: row["rounding"] for row in rows if row["rounding"]}
    for name, rounding in rounded.items():
        errors = rounding["quality"]["engine"] or rounding["quality"]["simulated"]
        table = [[f"{one['timestep']:g}", f"{one['relative']:.2%}", f"{one['relative'] ** 2:.1e}"] for one in errors]
        largest = list(rounding["sensitivity"].items())[:SHOWN_LAYERS]
        yield from ("", f"## {name}", "")
        yield from markdown_table(("timestep", "error of the prediction, relative", "squared"), table)
        yield from ("", "Rounded alone, estimated to first order:", "")
        yield from markdown_table(("layer", "relative"), [[layer, f"{error**0.5:.2%}"] for layer, error in largest])


def _cells(row: Mapping[str, Any]) -> list[str]:
    figures = (("right", "{:.1%}"), ("psnr_mean_db", "{:.1f}"), ("psnr_min_db", "{:.1f}"), ("ssim_mean", "{:.3f}"))
    return [
        row["subject"],
        row["run"],
        *(NONE if row[name] is None else form.format(row[name]) for name, form in figures),
    ]


def main() -> None:
    """Measure and write."""
    asked = parse(
        __doc__, models="demo", targets="onnxruntime,openvino", captions=50, work=ROOT / "artifacts" / "int8-quality"
    )
    os.chdir(ROOT)  # paths in the results are relative to it
    given = {name: getattr(asked, name) for name in ("models", "targets", "captions")}
    piece = Piece("int8-quality", "bench_int8_quality:measure", {**given, "work": str(asked.work)})
    result = run_or_exit(piece, Place(asked.work, python_path(), logged=False))
    command = command_of("bench_int8_quality.py", asked, *given)
    found = {
        "machine": machine(), "date": today(), "commit": commit(), "command": command, "rows": result["rows"],
    }  # fmt: skip
    keep(asked.output / machine() / "int8-quality.json", found, list(page(found)))


if __name__ == "__main__":
    main()
