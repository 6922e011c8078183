"""`sdkd plot`: a run's losses and validation images as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdkd.core.console import show


def plot(
    run: Annotated[Path, typer.Argument(help="Output folder of sdkd distill, finetune or lora.")],
    output: Annotated[Path | None, typer.Option(help="HTML file. [default: plot.html in the folder]")] = None,
) -> None:
    """Draw a run's losses and validation images as one page, also while it goes on. An earlier page is drawn again."""
    from sdkd.distill.training.plot import write_page

    show(f"Saved {write_page(run, output)}")
