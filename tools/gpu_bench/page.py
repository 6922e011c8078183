"""The page for people, made from a report's JSON alone, and what a data-centre GPU should reach, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bench_kit.comparison import builds_table, comparison_lines
from bench_kit.overhead import overhead_lines
from bench_kit.results import NONE, ratio_cell

from gpu_bench.settings import TENSORRT
from sdkd.core.console import markdown_table

Json = Mapping[str, Any]


def rows_of(found: Json, kind: str) -> list[Json]:
    """The rows of all pieces of a kind."""
    return [row for name, piece in found["pieces"].items() if name.partition("/")[0] == kind for row in piece["rows"]]


def facts_of(found: Json, fact: str) -> Iterator[tuple[str, Any]]:
    """Every piece that has a fact, and the fact."""
    yield from ((name, piece["facts"][fact]) for name, piece in found["pieces"].items() if fact in piece["facts"])


# Goals


@dataclass(frozen=True)
class Goal:
    """One goal: in words, what is wanted, the value (None: not measured), whether it was met, and what is missing."""

    words: str
    wanted: str
    value: float | None
    unit: str
    met: bool
    gap: str

    @property
    def measured(self) -> str:
        """The value in words."""
        return "not measured" if self.value is None else f"{self.value:,.2f}{self.unit}"


def _engines(found: Json, piece: str) -> list[Json]:
    """Results of engines in one comparison."""
    report = dict(facts_of(found, "comparison")).get(piece, {"results": ()})
    return [row for row in report["results"] if row["bundle"]]


def _faster(found: Json, piece: str, over: str) -> float | None:
    """The best engine's speed over a baseline."""
    rows = _engines(found, piece)
    return max((row["step_speedup"][over]["value"] for row in rows if over in row["step_speedup"]), default=None)


def _share_at_most(found: Json) -> float | None:
    """The best engine's share of the matrix rate at the report's largest batch."""
    rows = _engines(found, f"compare/tiny-batch{max(found['settings']['batches'])}")
    return max((row["limit"]["matrix_share"] for row in rows if row["limit"]), default=None)


def _added(found: Json) -> float | None:
    """Microseconds that the runtime adds to the replay of a CUDA graph, at most over the targets."""
    rows = [row for row in rows_of(found, "overhead") if row["slot"] in TENSORRT]
    return max((1e6 * row["overhead_seconds"][0] for row in rows), default=None)


def _trained(found: Json, what: str) -> float | None:
    """The smallest ratio of the reference's step to ours, over batches, for the small student."""
    rows = {(row["way"], row["batch"]): row[what] for row in rows_of(found, "train") if row["student"] == "small"}
    ratios = [
        base / own
        for (way, batch), base in rows.items()
        if way == "reference" and base and (own := rows.get(("Trainer.step", batch)))
    ]
    return min(ratios, default=None)


GOALS: tuple[tuple[str, float, str, Callable[[Json], float | None], bool], ...] = (
    ("UNet step of tiny on its best target, over eager", 2.5, "x",
     lambda found: _faster(found, "compare/tiny", "eager"), True),
    ("teacher in eager PyTorch to tiny on its best target", 6.0, "x",
     lambda found: _faster(found, "teacher-to-student", "teacher"), True),
    ("share of the matrix rate at the largest batch, tiny", 0.5, "", _share_at_most, True),
    ("what the runtime adds to a step", 50.0, " us", _added, False),
    ("training of small, images per second over the reference", 2.5, "x",
     lambda found: _trained(found, "seconds_median"), True),
    ("memory of the reference over ours, small", 2.0, "x", lambda found: _trained(found, "memory_gb"), True),
)  # fmt: skip


def goals(found: Json) -> list[Goal]:
    """Every goal with what the report says of it."""
    every = []
    for words, wanted, unit, measure, at_least in GOALS:
        value = measure(found)
        met = value is not None and (value >= wanted if at_least else value <= wanted)
        gap = "" if value is None else f"{abs(value - wanted):,.2f}{unit} {'short' if at_least else 'too much'}"
        text = f"{'at least' if at_least else 'at most'} {wanted:g}{unit}"
        every.append(Goal(words, text, value, unit, met, gap))
    return every


# The page


def what_runs(found: Json) -> list[str]:
    """First of all: which TensorRT kinds build, open and run here, in the library's own words."""
    rows = [
        [one["target"], one["plan"], one["version"] or NONE, "yes" if one["step"] == "ran" else f"no: {one['step']}",
         one["message"] or NONE]
        for _, trials in facts_of(found, "trials") for one in trials
    ]  # fmt: skip
    return rows and markdown_table(("target", "plan", "version", "runs", "what the library said"), rows, left=5)


def comparisons(found: Json) -> list[str]:
    """The page of every comparison; what explains a column stands in the first one alone."""
    lines: list[str] = []
    for name, text in facts_of(found, "markdown"):
        said = {line for line in lines if line.startswith("- ") and not line.startswith(("- **", "- Note: "))}
        lines += [line for line in comparison_lines(text, (f"### {name}", "")) if line not in said]
        lines.append("")
    return lines[:-1]


def exports(found: Json) -> list[str]:
    """Exports and engines, each once, though several pieces use it."""
    rows = {(row["model"], row["component"], row["made"]): row for _, rows in facts_of(found, "builds") for row in rows}
    return builds_table(rows.values()) if rows else []


def loras(found: Json) -> list[str]:
    """Changes of weights."""
    rows = [
        [row["way"], f"{row['on_s']:,.2f}", f"{row['off_s']:,.2f}",
         "exact" if row["exact_back"] else f"{row['back']:.1e}"]
        for row in rows_of(found, "lora")
    ]  # fmt: skip
    return rows and markdown_table(("way", "LoRA on, s", "off, s", "after it was taken off"), rows)


def training(found: Json) -> list[str]:
    """Distillation steps."""
    rows = [
        [row["student"], row["way"], str(row["batch"]), f"{row['images_per_second']:,.2f}",
         ratio_cell([row[key] for key in ("speedup", "speedup_low", "speedup_high")]),
         NONE if row["memory_gb"] is None else f"{row['memory_gb']:,.2f}",
         f"{row['limit']['fraction']:.0%} ({row['limit']['bound']})"]
        for row in rows_of(found, "train")
    ]  # fmt: skip
    heads = ("student", "step", "batch", "images/s", "over the reference (95 %)", "GB", "of the limit")
    return rows and markdown_table(heads, rows, left=2)


def against_goals(found: Json) -> list[str]:
    """What was to be reached, and what was."""
    rows = [
        [goal.words, goal.wanted, goal.measured, "" if goal.value is None else "yes" if goal.met else f"no, {goal.gap}"]
        for goal in goals(found)
    ]
    return markdown_table(("goal", "wanted", "measured", "reached"), rows)


def not_measured(found: Json) -> list[str]:
    """Pieces that are missing or went wrong, in their own words."""
    rows = [
        [name, piece["state"], "; ".join(f"{part}: {text}" for part, text in piece["errors"].items())[:1500] or NONE]
        for name, piece in found["pieces"].items()
        if piece["state"] != "done" or piece["errors"]
    ]
    return rows and markdown_table(("piece", "state", "why"), rows, left=3)


SECTIONS: tuple[tuple[str, Callable[[Json], list[str]]], ...] = (
    ("What runs here", what_runs), ("Comparisons", comparisons), ("Exports and builds", exports),
    ("The runtime over the bare library",
     lambda found: overhead_lines(rows)[2:] if (rows := rows_of(found, "overhead")) else []),
    ("LoRA", loras), ("Distillation steps", training), ("Goals", against_goals), ("Missing, or failed", not_measured),
)  # fmt: skip


def page(found: Json) -> list[str]:
    """The lines of the page for people."""
    environment, settings = found["environment"], found["settings"]
    device = environment["gpu"]["gpu"] if environment["gpu"] else environment["cpu"]
    models = ", ".join(f"{label} = `{model}`" for label, model in settings["models"].items())
    lines = [
        f"# Everything on {device}",
        "",
        f"Measured on {found['machine']}, {found['date']}, commit {found.get('commit') or 'unknown'}; {models}; "
        f"{settings['precision']}, medians.",
    ]
    if found["dry_run"]:
        lines += ["", "**A dry run: tiny models on a CPU, few calls. No figure here is a measurement.**"]
    for title, show in SECTIONS:
        if shown := show(found):
            lines += ["", f"## {title}", "", *shown]
    return lines
