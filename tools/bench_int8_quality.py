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

from bench_kit.demo_models import drawn_scenes
from bench_kit.record import Record
from bench_kit.results import NONE, ROOT, command_of, head, keep, machine, parse
from bench_kit.runner import Piece, Place, python_path, run_or_exit

from sdkd.compare.measure.quality import OTHER_IMAGE_DB, likeness
from sdkd.core.console import markdown_table

SHOWN_LAYERS = 5  # of the sensitivities, the largest
BATCH = 20  # images at once


def measure(record: Record, models: str, targets: str, captions: int, work: str) -> None:
    """The images of every model in float and on engines, and what the engines' records say."""
    from sdkd.compare.measure.defaults import AS_MADE, runs_of
    from sdkd.core.console import progress, within

    names, scenes = models.split(","), drawn_scenes(captions)
    runs, _ = runs_of(names, AS_MADE)
    with progress("int8 quality") as shown:
        for place, model in enumerate(names):
            part = within(shown, place / len(names), (place + 1) / len(names))
            _model(record, model, runs[model], targets.split(","), scenes, Path(work), part)


def _model(
    record: Record, model: str, run: Any, targets: Sequence[str], scenes: Sequence[Any], work: Path, progress: Any
) -> None:
    """A row of a model in eager float32, and one for each target; its bundle and engines are made where missing."""
    from engines.pipelines.pipeline import load_pipeline
    from sdkd.bundle.manifest import Bundle
    from sdkd.bundle.quantized import Quantized
    from sdkd.core.console import within
    from sdkd.core.profiles import Range, ShapeRanges
    from sdkd.models.resolve import load_eager, resolve
    from sdkd.targets.plan import plan_for_model
    from sdkd.toyworld.scenes import IMAGE_SIZE
    from sdkd.workflow import prepare

    name = Path(model).name
    progress(f"{name} eager", 0.0)
    eager = _images(load_eager(resolve(model)), run, scenes)
    record.row(**_row(f"{name} eager", run, eager, scenes))
    ranges = ShapeRanges(Range(1, BATCH, BATCH), *(Range.fixed(number) for number in (IMAGE_SIZE, IMAGE_SIZE, 77)))
    for place, target in enumerate(targets, 1):
        part = within(progress, place / (1 + len(targets)), (place + 1) / (1 + len(targets)))
        made = prepare(resolve(model), plan_for_model(target, "int8"), work / name, ranges=ranges, progress=part)
        progress(f"{name} {made.slot}", (place + 0.7) / (1 + len(targets)))
        images = _images(load_pipeline(made.bundle, made.slot), run, scenes)
        rounding = Quantized.of(Bundle.open(made.bundle).engine(made.slot, "unet").flags)
        record.row(**_row(f"{name} {made.slot}", run, images, scenes, eager, rounding))


def _images(pipe: Any, run: Any, scenes: Sequence[Any]) -> list[Any]:
    from sdkd.models.schedulers import use_scheduler
    from sdkd.toyworld.reader import draw

    use_scheduler(pipe, run.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return draw(pipe, scenes, run.steps, run.guidance_scale, seed=0, batch_size=BATCH)


def _row(
    subject: str, run: Any, images: Sequence[Any], scenes: Sequence[Any], eager: Any = None, rounding: Any = None
) -> dict[str, Any]:
    """One subject's result."""
    from sdkd.compare.measure.results import rounding_json
    from sdkd.toyworld.reader import judge_captions
    from sdkd.toyworld.scenes import caption

    judged = judge_captions(images, [caption(scene) for scene in scenes])
    close = likeness(images, eager, "eager") if eager else None
    return {
        "subject": subject, "run": str(run), "judged": judged, "right": sum(judged.values()) / len(judged),
        "psnr_mean_db": close and close.psnr_mean_db, "psnr_min_db": close and close.psnr_min_db,
        "ssim_mean": close and close.ssim_mean,
        "per_image_psnr_db": close and [round(one.counted_db, 2) for one in close.per_image],
        "rounding": rounding and {**rounding_json(rounding), "sensitivity": dict(rounding.ranking)},
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
    yield from ("", f"Images below {OTHER_IMAGE_DB:g} dB, which are other images:", "")
    for row in rows:
        if each := row["per_image_psnr_db"]:
            yield f"- {row['subject']}: {sum(one < OTHER_IMAGE_DB for one in each)} of {len(each)}"
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
    found = {**head(command), "rows": result["rows"]}
    keep(asked.output / machine() / "int8-quality.json", found, list(page(found)))


if __name__ == "__main__":
    main()
