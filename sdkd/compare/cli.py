"""`sdkd compare`: models and targets side by side, as a table, JSON and one HTML page."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdkd.core.console import progress, show, show_json, styled, within
from sdkd.core.files import lock
from sdkd.core.numbers import check_number
from sdkd.errors import InputError
from sdkd.models.resolve import resolve

if TYPE_CHECKING:
    from sdkd.compare.measure.earlier import Earlier
    from sdkd.compare.measure.results import Report

DEMO = "demo"


def compare(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Models or bundles; a bundle brings its engines. Default: demo."),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(help="E.g. eager,compile-bf16,openvino,openvino-bf16. Default: eager and all that run here."),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Precision of engines that are built: fp32, fp16, bf16, int8, fp8.")
    ] = None,
    vae: Annotated[
        str | None, typer.Option(help="Compare every model with this VAE, too; as `sdkd export` takes it.")
    ] = None,
    cache_interval: Annotated[
        int | None,
        typer.Option(min=1, help="Compare every model with step caching, too: of so many calls one is whole."),
    ] = None,
    prompts: Annotated[str | None, typer.Option(help="A file with one prompt per line, or 'a;b'.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps of all. Default: what each model was made for, else 25.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0, help="Of all. Default: each model's, else 7.5, or 4 for the demo's models.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Pixels: 512, or height x width as 512x768. Default: the model's own.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 1,
    scheduler: Annotated[
        str | None, typer.Option(help="For all subjects, as in sdkd generate. Default: each model's own.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; image n starts from seed + n.")] = 0,
    runs: Annotated[int, typer.Option(min=1, help="UNet calls timed per subject, at least.")] = 30,
    image_runs: Annotated[int, typer.Option(min=1, help="Whole images timed per subject.")] = 3,
    staircase: Annotated[
        bool,
        typer.Option("--staircase", help="What each change brings: models in order, the last with --vae, its engines."),
    ] = False,
    baseline: Annotated[str | None, typer.Option(help="A subject's label to give one more ratio to.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="An earlier report.json: say what became faster, slower or wrong since.")
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0, help="With --against: share that a UNet step may take longer, 0.1 for 10 %.")
    ] = 0.1,
    report: Annotated[
        Path | None, typer.Option(help="With --against: another report.json, compared without measuring.")
    ] = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="All subjects in one process: a crash ends all.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("artifacts/compare"),
    bundles: Annotated[Path, typer.Option(help="Folder for engines that are built.")] = Path("artifacts/bundles"),
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of tables.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a report that is there.")] = False,
) -> None:
    """Compare models and targets: speed, size and likeness.

    Every subject is measured in a fresh process of its own, in rounds over all. Writes report.html (one page, images
    side by side), report.json (raw samples) and report.md. Engines that are missing are built. Status 1, after the
    report is written, when a subject fails, an engine breaks its rule, or a subject is slower than in the report of
    --against by more than --threshold.
    """
    if report is not None:
        compare_reports(models, against, report, threshold, json)
        return
    from sdkd.compare.measure.environment import load_average

    load = load_average()  # before engines are built
    from engines.generate.cli import drawn_size
    from sdkd.compare.measure.comparison import compare as measure
    from sdkd.compare.measure.defaults import RunsAsked, default_judge, parse_prompts
    from sdkd.compare.measure.earlier import read_report
    from sdkd.compare.measure.planning import Wish, make_plan
    from sdkd.compare.measure.refusals import check_asked
    from sdkd.compare.report.files import check_report_free, write_report

    names = models or [DEMO]
    check_number("threshold", threshold, 0)
    earlier = None if against is None else read_report(against)
    check_report_free(output, overwrite, [*names, vae, prompts, against])
    opened = [resolve(name) for name in names]
    kept = parse_prompts(prompts, opened)
    pixels = None if size is None else drawn_size(size)
    settings: dict[str, Any] = {"batch": batch, "seed": seed, "runs": runs, "image_runs": image_runs}
    check_asked(kept, pixels, **settings, steps=steps, guidance_scale=guidance_scale)
    settings |= {"baseline": baseline}
    asked = RunsAsked(steps, guidance_scale, scheduler)
    wish = Wish(_targets(targets), precision, pixels, bundles, batch, vae, asked, staircase, cache_interval or 1)
    options = {"targets": targets, "precision": precision, "vae": vae, "prompts": ";".join(kept), "size": size}
    whole = {"cache_interval": cache_interval, "staircase": staircase, "in_process": in_process}
    command = make_again(names, options | vars(asked) | settings | whole)
    with lock(output), progress("compare") as bar:
        plan = make_plan(opened, wish, within(bar, 0.0, 0.3), partial(_check_labels, baseline, earlier))
        found = measure(
            plan.subjects, prompts=kept, size=pixels, judge=default_judge(opened, kept, pixels), command=command,
            notes=plan.notes, failed=plan.failed, isolate=not in_process, load_before=load,
            staircase=[subject.label for subject in plan.subjects] if staircase else (),
            progress=within(bar, 0.3, 1.0), **settings,
        )  # fmt: skip
        found = found if earlier is None else found.held_against(earlier, threshold)
        try:
            page = write_report(found, output, overwrite)
        except Exception:
            _show_report(found, None, json)  # what was measured is shown all the same
            raise
    _show_report(found, page, json)
    found.check(page)


def _check_labels(baseline: str | None, earlier: Earlier | None, labels: list[str]) -> None:
    from sdkd.compare.measure.against import check_common
    from sdkd.compare.measure.comparison import check_baseline

    check_baseline(baseline, labels)
    if earlier is not None:
        check_common(earlier, labels)


def _show_report(report: Report, page: Path | None, json: bool) -> None:
    """The report on standard output, as JSON or as tables."""
    if json:
        show_json(report.to_json())
        return
    from sdkd.compare.report.tables import terminal_table
    from sdkd.compare.report.words import notes, sentence

    seen = [f"Look at {page}"] if page else []
    show(styled(sentence(report), "bold"), terminal_table(report), *notes(report), *seen)


def compare_reports(models: list[str] | None, against: Path | None, report: Path, threshold: float, json: bool) -> None:
    """Compare two reports on disk and print it; InputError for models or a missing --against, then as `problem`."""
    if against is None or models:
        raise InputError(
            f"--report {str(report)!r} compares two reports and measures nothing: give --against earlier.json, no model"
        )
    from sdkd.compare.measure.against import compare_files

    found = compare_files(against, report, threshold)
    if json:
        show_json(found.to_json())
    else:
        from sdkd.compare.report.tables import against_table

        show(against_table(found))
    if (problem := found.problem()) is not None:
        raise problem


def _targets(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def make_again(models: list[str], options: Mapping[str, object]) -> str:
    """The command that makes the comparison again, with every setting spelled out; None and False are none."""
    words = ["sdkd", "compare", *models]
    for name, value in options.items():
        if value is True:
            words.append(f"--{name.replace('_', '-')}")
        elif value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)
