"""The command `sdkd demo`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from sdkd.core.console import progress, show
from sdkd.core.files import lock
from sdkd.demo.run import DemoResult, DemoSettings, check_outputs, made_folders, run_demo


def demo(
    output: Annotated[Path, typer.Option(help="Folder for models, bundles, images and the report.")] = Path(
        "artifacts/demo"
    ),
    steps: Annotated[
        int | None, typer.Option(help="Training steps of every student (default: the demo's own).")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Re-use nothing of an earlier run.")] = False,
) -> None:
    """The whole way on this machine, with the embedded teacher.

    Builds and distils the small and tiny students, the tiny one then for 4 steps, exports them, builds every engine
    this machine can, generates the same prompts with each and compares them. Run again, it re-uses what is fresh.
    """
    settings = DemoSettings() if steps is None else DemoSettings(distill_steps=steps, consistency_steps=steps)
    check_outputs(output)
    with lock(output):
        for folder in made_folders(output) if fresh else ():
            shutil.rmtree(folder, ignore_errors=True)
        with progress("demo") as report:
            result = run_demo(output, settings, report)
    _tell(result)
    if result.report is not None and result.report.failed:
        result.report.check(output / "report.html")


def _tell(result: DemoResult) -> None:
    from sdkd.compare.report.tables import terminal_table

    assert result.report is not None
    show(terminal_table(result.report))
    if result.reused:
        show(f"Re-used from an earlier run: {', '.join(result.reused)}.")
    for target, why in result.skipped.items():
        show(f"{target}: {why}")
    folder = result.folder
    show(
        f"\nLook at {folder}/report.html (images side by side), {folder}/demo.png and {folder}/report.json.",
        "\nNext, with a real checkpoint:",
        "  sdkd doctor",
        "  sdkd student runwayml/stable-diffusion-v1-5 artifacts/my-tiny --student tiny",
        "  sdkd build-engine segmind/tiny-sd --target tensorrt --size 512 --batch 1..4 --output artifacts/tiny-sd",
        "  sdkd compare artifacts/tiny-sd",
        sep="\n",
    )
