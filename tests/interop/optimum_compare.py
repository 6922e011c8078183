"""A comparison in the environment of Optimum, with our packages on PYTHONPATH: MODEL BUNDLE REPORT."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sdkd.compare import Subject, compare


def main(model: str, bundle: str, output: str) -> None:
    """Compare a model in eager PyTorch with Optimum on its bundle, and keep the report."""
    subjects = [Subject("small eager", model), Subject("small optimum", model, "optimum", bundle=Path(bundle))]
    report = compare(
        subjects, prompts=["a red star", "a blue ring"], steps=3, size=32, runs=3, min_seconds=0.0, isolate=True
    )
    Path(output).write_text(json.dumps(report.to_json(), allow_nan=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
