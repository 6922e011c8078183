"""`sdkd generate` as a command line, within this process, and the pixels that it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import typer
from PIL import Image
from typer.testing import CliRunner

from engines.generate.cli import generate

app = typer.Typer()
app.command()(generate)


def run(*words: object) -> Any:
    """The command's result: exit status, output, and the exception that it ended with."""
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=True)


def pixels(path: Path) -> np.ndarray:
    """An image's values, as floats."""
    return np.asarray(Image.open(path), dtype=np.float64)
