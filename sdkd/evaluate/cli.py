"""`sdkd evaluate`: quality of models, and agreement with their teacher."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from sdkd.core.console import progress, show, show_json, table
from sdkd.distill.data.rows import CAPTION_COLUMNS, split_columns


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders, hub ids, .safetensors or demo.")],
    teacher: Annotated[
        str | None, typer.Option(help="To agree with. Default: what a student was made from, if it is here.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Captioned images for the noise prediction, or a cache, as for distill; or demo.")
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of the data's image. [default: found]")] = None,
    caption_columns: Annotated[str, typer.Option(help="Columns; the first one found.")] = ",".join(CAPTION_COLUMNS),
    prompts: Annotated[
        str | None, typer.Option(help="A file with one prompt per line, or 'a;b'. Default: the data's captions.")
    ] = None,
    real: Annotated[Path | None, typer.Option(help="Folder of real images, for FID and CMMD.")] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Images per model; prompts repeat. Of the demo: seen, and held out.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps of all. Default: what each model was made for, else 25.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Of all. Default: each model's, else 7.5, or 4 for the demo's models.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Of all, as in sdkd generate. Default: each model's own.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; image n starts from seed + n.")] = 0,
    clip: Annotated[Path | None, typer.Option(help="Folder of a CLIP model. Default: from the hub's cache.")] = None,
    inception: Annotated[Path | None, typer.Option(help="Weights of FID's Inception. Default: torch's cache.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    output: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("artifacts/evaluate"),
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of a table.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a report that is there.")] = False,
) -> None:
    """Evaluate models: agreement with the teacher, caption accuracy, CLIP score, FID and CMMD.

    Writes evaluation.json (every value) and evaluation.md. Nothing is downloaded for a metric: what it lacks is said.
    """
    from sdkd.core.files import check_free, lock
    from sdkd.distill.training.setup import pick_device
    from sdkd.evaluate.evaluation import Settings
    from sdkd.evaluate.evaluation import evaluate as measure
    from sdkd.evaluate.report import TITLES, heads, rows, write_report

    check_free(output, overwrite, [*models, teacher, data, prompts, real, clip, inception])
    settings = Settings(
        teacher, data, prompts, real, images, steps, guidance, scheduler, seed, clip, inception,
        str(pick_device(device, "fp32")), image_column, split_columns(caption_columns),
    )  # fmt: skip
    with lock(output), progress("evaluate") as bar:
        found = measure(models, settings, shlex.join(["sdkd", *sys.argv[1:]]), bar)
        page = write_report(found, output, overwrite)
    if json:
        show_json(found.to_json())
        return
    missing = found.missing()
    names = [name for name in TITLES if name not in missing]
    show(table("Evaluation", heads(found.results, names), rows(found.results, names)))
    for name, why in missing.items():
        show(f"{TITLES[name]}: not measured: {why}")
    show(*found.notes, f"Saved {page}")
