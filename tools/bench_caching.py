"""Step caching: seconds of an image, caption accuracy and likeness, by cache interval.

    python tools/bench_caching.py                                          # the demo's teacher, eager and OpenVINO
    python tools/bench_caching.py --models demo,artifacts/demo/models/tiny --captions 200

Every model in eager float32 and on --target, computing every step and at each of --intervals, on captions of drawn
shapes. Likeness is to the model's own eager images that compute every step; ratios of whole images are over interval 1
of the same target. Writes benchmarks/<machine>/caching.json and .md. Run it on a quiet machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench_kit.comparison import builds_table, keep_comparison
from bench_kit.demo_models import drawn_captions
from bench_kit.record import Record
from bench_kit.results import NONE, ROOT, command_of, commit, faster, keep, machine, parse, ratio_cell, today
from bench_kit.runner import Piece, Place, python_path, run_or_exit

from sdkd.core.console import markdown_table

RUNS = 9  # UNet calls timed, at least


def subjects_of(model: str, target: str, intervals: list[int], size: int, folder: Path, progress: Any) -> list[Any]:
    """A model in eager float32 and on engines, at every interval; its bundle is made where it is missing."""
    from sdkd.compare import Subject
    from sdkd.core.profiles import Range, ShapeRanges
    from sdkd.models.resolve import resolve
    from sdkd.targets.plan import plan_for_model
    from sdkd.targets.registry import slot_precision
    from sdkd.workflow import prepare

    plan, name = plan_for_model(target, slot_precision(target)), Path(model).name
    ranges = ShapeRanges(*(Range.fixed(number) for number in (1, size, size, 77)))
    made = prepare(resolve(model), plan, folder / name, ranges=ranges, cached=True, progress=progress)
    return [
        Subject(f"{name} {slot} {interval}", model, slot, precision, bundle, cache_interval=interval)
        for slot, precision, bundle in (("eager", "fp32", None), (made.slot, plan.precision, made.bundle))
        for interval in (1, *intervals)
    ]


def measure(record: Record, models: str, target: str, intervals: str, captions: int, steps: int, work: str) -> None:
    """The comparison of all models at all intervals."""
    from sdkd.compare import compare
    from sdkd.compare.measure.defaults import default_guidance, default_judge
    from sdkd.compare.measure.environment import load_average
    from sdkd.core.console import progress
    from sdkd.toyworld.scenes import IMAGE_SIZE

    load, names = load_average(), models.split(",")
    prompts = drawn_captions(captions)
    with progress("step caching") as shown:
        every = [
            subject
            for model in names
            for subject in subjects_of(model, target, [*map(int, intervals.split(","))], IMAGE_SIZE, Path(work), shown)
        ]
        report = compare(
            every, prompts=prompts, steps=steps, guidance_scale=default_guidance(names), runs=RUNS, min_seconds=0.5,
            image_runs=RUNS, judge=default_judge(names, prompts, None), isolate=True, load_before=load, progress=shown,
        )  # fmt: skip
    keep_comparison(record, report, [Path(work)])


def rows_of(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a comparison found, by model, target and interval."""
    results = comparison["results"]
    whole = {(row["model"], row["target"]): row for row in results if row["cache_interval"] == 1}
    found = []
    for row in results:
        base, close, judged = whole[row["model"], row["target"]], row["against_eager"], row["judged"]
        ratio = None if row is base else faster(base["image_s"]["samples"], row["image_s"]["samples"])
        found.append({
            "subject": row["label"].rpartition(" ")[0], "interval": row["cache_interval"],
            "image_s": row["image_s"]["median"], "unet_step_ms": row["unet_step_ms"]["median"], "faster": ratio,
            **{name: close and close[name] for name in ("identical", "psnr_mean_db", "ssim_mean")},
            "judged": judged, "right": judged and sum(judged.values()) / len(judged),
        })  # fmt: skip
    return found


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row in words."""
    psnr, ssim, right = (row[name] for name in ("psnr_mean_db", "ssim_mean", "right"))
    none = "identical" if row["identical"] else NONE
    return [
        row["subject"], str(row["interval"]), f"{row['image_s']:.3g}", ratio_cell(row["faster"]),
        none if psnr is None else f"{psnr:.1f}", NONE if ssim is None else f"{ssim:.3f}",
        NONE if right is None else f"{right:.1%}",
    ]  # fmt: skip


def main() -> None:
    """Measure and write."""
    asked = parse(
        __doc__, models="demo", target="openvino", intervals="2,3,5", captions=50, steps=25,
        work=Path("artifacts/bench-caching"),
    )  # fmt: skip
    os.chdir(ROOT)  # paths in the results are relative to it
    given = {name: getattr(asked, name) for name in ("models", "target", "intervals", "captions", "steps")}
    piece = Piece("caching", "bench_caching:measure", {**given, "work": str(asked.work)})
    facts = run_or_exit(piece, Place(asked.work, python_path(), logged=False))["facts"]
    rows = rows_of(facts["comparison"])
    command = command_of("bench_caching.py", asked, *given)
    found = {"date": today(), "commit": commit(), "command": command, "rows": rows, **facts}
    heads = ("subject", "interval", "an image, s", "faster", "PSNR, dB", "SSIM", "captions right")
    lines = [
        f"# Step caching on {machine()}", "", f"{found['date']}, commit {found['commit']}", "",
        f"{asked.captions} captions, {asked.steps} steps. Medians; ratios of whole images over interval 1 of the same "
        "target, with a 95 % bootstrap interval. PSNR and SSIM are to the model's own eager images that compute every "
        "step; captions right: the mean over what `sdkd compare` reads in the images.", "",
        *markdown_table(heads, [cells(row) for row in rows], left=1),
        "", "## Exports and builds", "", *builds_table(found["builds"]),
    ]  # fmt: skip
    keep(asked.output / machine() / "caching.json", found, lines)


if __name__ == "__main__":
    main()
