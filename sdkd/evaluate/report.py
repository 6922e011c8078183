"""What an evaluation found, and how it is written: evaluation.json with every value, evaluation.md for people."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sdkd.core.console import markdown_table, no_html
from sdkd.core.files import new_folder, write_bytes, write_json
from sdkd.models.generation import Generation

SCHEMA = 2  # 1 had one number of steps and one guidance scale for all models
FILES = ("evaluation.json", "evaluation.md")
NOISE, PSNR, CAPTIONS, CLIP, FID, CMMD = (
    "noise_prediction_mse",
    "psnr_to_teacher_db",
    "caption_accuracy",
    "clip_score",
    "fid",
    "cmmd",
)
TITLES = {
    NOISE: "Noise prediction, MSE to the teacher",
    PSNR: "Same-seed images, PSNR to the teacher (dB)",
    CAPTIONS: "Caption accuracy",
    CLIP: "CLIP score",
    FID: "FID",
    CMMD: "CMMD",
}


@dataclass(frozen=True)
class Metric:
    """One metric of one model: its values by name, the headline first, or why it was not measured."""

    values: Mapping[str, Any] = field(default_factory=dict)
    not_measured: str | None = None

    @property
    def headline(self) -> float | None:
        """The first value, None when nothing was measured."""
        return None if self.not_measured else float(next(iter(self.values.values())))

    def to_json(self) -> dict[str, Any]:
        """The values, or {"not_measured": why}."""
        return dict(self.values) if self.not_measured is None else {"not_measured": self.not_measured}


@dataclass(frozen=True)
class ModelResult:
    """What was found for one model."""

    model: str
    role: str  # teacher, student or model
    random_weights: bool
    unet_parameters: int
    run: Generation  # what it was drawn with
    metrics: Mapping[str, Metric]


@dataclass(frozen=True)
class Evaluation:
    """A whole evaluation."""

    results: tuple[ModelResult, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    command: str | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; every per-image value is in it."""
        models = [
            asdict(result) | {"metrics": {name: metric.to_json() for name, metric in result.metrics.items()}}
            for result in self.results
        ]
        return {
            "schema": SCHEMA,
            "command": self.command,
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "notes": list(self.notes),
            "models": models,
        }

    def missing(self) -> dict[str, str]:
        """Metric -> why it was not measured, for metrics that no model has."""
        names = [name for name in TITLES if all(result.metrics[name].not_measured for result in self.results)]
        return {name: str(self.results[0].metrics[name].not_measured) for name in names}

    def to_markdown(self) -> str:
        """The tables, then what is missing and how to get it."""
        lines = ["# Evaluation", "", *_table(self.results, [name for name in TITLES if name not in self.missing()])]
        lines += _buckets(self.results)
        if reasons := _reasons(self.results):
            lines += ["", "## Not measured", "", *reasons]
        lines += ["", "## Settings", "", *(f"- {name}: {_short(value)}" for name, value in self.settings.items())]
        lines += [f"- {result.model}: {result.run}" for result in self.results]
        lines += ["", "Versions: " + ", ".join(f"{name} {version}" for name, version in self.versions.items())]
        lines += [f"\n{note}" for note in self.notes]
        text = no_html("\n".join(lines)) + "\n"
        return text + (f"\nMade with: `{self.command}`\n" if self.command else "")


def _short(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "; ".join(map(str, value[:4])) + (f"; ... ({len(value)} in all)" if len(value) > 4 else "")
    return str(value)


def cell(name: str, metric: Metric) -> str:
    """One table cell: the headline, and what says how far to trust it."""
    if metric.not_measured is not None:
        return "not measured"
    values, head = metric.values, metric.headline
    if name == PSNR:
        return "identical" if values["identical"] else f"{head:.1f} (worst {values['worst']:.1f})"
    if name == CAPTIONS:
        return f"seen {values['seen']:.1%}, held out {values['held_out']:.1%}"
    return f"{head:.3g}" if name == NOISE else f"{head:.2f}"


def heads(results: Sequence[ModelResult], names: Sequence[str]) -> list[str]:
    """What the columns of `rows` are."""
    return [
        "model",
        "role",
        "UNet (M)",
        *(["steps", "guidance"] if _mixed(results) else []),
        *(TITLES[n] for n in names),
    ]


def _mixed(results: Sequence[ModelResult]) -> bool:
    return len({(result.run.steps, result.run.guidance_scale) for result in results}) > 1


def rows(results: Sequence[ModelResult], names: Sequence[str]) -> list[list[str]]:
    """One row per model: name, parameters of the UNet in millions, how it was drawn where they differ, the metrics."""
    return [
        [
            f"{result.model}{' (random weights)' if result.random_weights else ''}",
            result.role,
            f"{result.unet_parameters / 1e6:.2f}",
            *([str(result.run.steps), f"{result.run.guidance_scale:g}"] if _mixed(results) else []),
            *(cell(name, result.metrics[name]) for name in names),
        ]
        for result in results
    ]


def _table(results: Sequence[ModelResult], names: Sequence[str]) -> list[str]:
    head = [name[0].upper() + name[1:] for name in heads(results, names)]
    return markdown_table(head, rows(results, names), left=len(head))


def _buckets(results: Sequence[ModelResult]) -> list[str]:
    measured = [result for result in results if result.metrics[NOISE].not_measured is None]
    if not measured:
        return []
    edges = measured[0].metrics[NOISE].values["edges"]
    head = ["Model", *(f"{low}-{high - 1}" for low, high in itertools.pairwise(edges))]
    body = [[one.model, *(f"{value:.3g}" for value in one.metrics[NOISE].values["buckets"])] for one in measured]
    return ["", "## Noise prediction, MSE to the teacher by timestep", "", *markdown_table(head, body, left=len(head))]


def _reasons(results: Sequence[ModelResult]) -> list[str]:
    """One line per metric and reason; models are named where only some lack it."""
    lines = []
    for name, title in TITLES.items():
        why: dict[str, list[str]] = {}
        for result in results:
            if (reason := result.metrics[name].not_measured) is not None:
                why.setdefault(reason, []).append(result.model)
        for reason, models in why.items():
            whose = "" if len(models) == len(results) else f" of {', '.join(models)}"
            lines.append(f"- {title}{whose}: not measured: {reason}")
    return lines


def write_report(evaluation: Evaluation, folder: Path, overwrite: bool = False) -> Path:
    """Write both files into a new folder, all or nothing; returns the Markdown file. Raises OutputExistsError."""
    with new_folder(folder, overwrite) as partial:
        write_bytes(partial / FILES[1], evaluation.to_markdown().encode())
        write_json(partial / FILES[0], evaluation.to_json())
    return folder / FILES[1]
