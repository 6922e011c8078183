"""The page for people, made from a report's JSON alone, and the limits that are worked out from its own ceilings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any

from bench_kit.results import NONE, ratio_cell, table

from gpu_bench.goals import EAGER, goals
from sdkd.compare.measure.limits import EXPLAINED, Ceilings, Work, fraction

Json = Mapping[str, Any]
TENSOR_CORES_FROM = 8  # major compute capability; every such GPU does more than LEAST_RATE in half precision
LEAST_RATE = 1e13


def all_rows(found: Json, what: str) -> Iterator[tuple[str, Json]]:
    """Label of the model (or student) and row, for every row of a kind."""
    for name, piece in found["pieces"].items():
        yield from ((name.partition("/")[2], row) for row in piece["rows"] if row["what"] == what)


def add_limits(found: dict[str, Any]) -> None:
    """Give every row whose work is known its `limit`, from the ceilings of the same precision in the report."""
    no_use = implausible(found)
    ceilings = {
        row["precision"]: Ceilings(row["flops_per_s"], row["bytes_per_s"], row["how"])
        for _, row in all_rows(found, "ceilings")
        if row["precision"] not in no_use
    }
    for piece in found["pieces"].values():
        for row in piece["rows"]:
            row.pop("limit", None)  # of earlier ceilings
            ceiling = ceilings.get(row.get("precision"))
            if "work" in row and ceiling and row["median_s"] > 0:
                row["limit"] = dataclasses.asdict(fraction(Work(**row["work"]), ceiling, row["median_s"]))


def implausible(found: Json) -> dict[str, str]:
    """Precisions whose measured matrix rate cannot be true of this GPU, and why."""
    device = found["environment"]["gpu"] or {}
    capability = device.get("compute_capability", "0.0")
    if int(capability.partition(".")[0]) < TENSOR_CORES_FROM:
        return {}
    return {
        row["precision"]: f"a matrix rate of {row['flops_per_s'] / 1e12:,.3g} TFLOP/s cannot be true of compute "
        f"capability {capability}, whose tensor cores do more than {LEAST_RATE / 1e12:g}: no row has a limit from it"
        for _, row in all_rows(found, "ceilings")
        if row["precision"] in ("fp16", "bf16") and row["flops_per_s"] < LEAST_RATE
    }


def _shown(value: float | None, form: str = ",.1f", scale: float = 1.0) -> str:
    return NONE if value is None else format(value * scale, form)


def _ms(seconds: float | None, form: str = ",.3f") -> str:
    return _shown(seconds, form, 1e3)


def _limit(row: Json) -> list[str]:
    limit = row.get("limit")
    if not limit:
        return [NONE, NONE]
    return [f"{limit['flops_per_s'] / 1e12:,.3g}", f"{limit['fraction']:.0%} ({limit['bound']})"]


def _gb_taken(row: Json) -> str:
    return _shown(row.get("taken_bytes") or None, ",.2f", 1e-9)


def what_runs(found: Json) -> list[str]:
    """First of all: which TensorRT kinds build, open and run here, in the library's own words."""
    facts = found["pieces"].get("doctor", {}).get("facts", {})
    rows = [
        [one["target"], one["plan"], one["version"] or NONE, "yes" if one["step"] == "ran" else f"no: {one['step']}",
         one["message"] or NONE]
        for one in facts.get("trials", ())
    ]  # fmt: skip
    return table(("target", "plan", "version", "runs", "what the library said"), rows, left=5)


def machine_limits(found: Json) -> list[str]:
    """The ceilings."""
    rows = [
        [row["precision"], row["how"], f"{row['flops_per_s'] / 1e12:,.3g}", f"{row['bytes_per_s'] / 1e9:,.1f}"]
        for _, row in all_rows(found, "ceilings")
    ]
    return table(("precision", "how", "TFLOP/s", "GB/s"), rows)


def _place(label: str, row: Json, way: str | None = None) -> tuple[Any, ...]:
    """What rows have in common that are of the same model, way and shape."""
    return label, way or row["way"], row["batch"], row["size"]


def unet_steps(found: Json) -> list[str]:
    """UNet steps, against eager with channels-last at the same shape."""
    medians = {_place(label, row): row["median_s"] for label, row in all_rows(found, "UNet step")}
    rows = []
    for label, row in all_rows(found, "UNet step"):
        eager = medians.get(_place(label, row, EAGER))
        times = f"{eager / row['median_s']:.2f}x" if eager and row["way"] != EAGER else NONE
        rows.append(
            [label, row["way"], str(row["batch"]), str(row["size"]), _ms(row["median_s"]),
             _ms(median(row["wall_seconds"])), times, *_limit(row), _gb_taken(row)]
        )  # fmt: skip
    heads = ("model", "way", "batch", "px", "ms", "wall, ms", "over eager", "TFLOP/s", "of the limit", "GB taken")
    return table(heads, rows)


def engines(found: Json) -> list[str]:
    """Builds, sizes, loading; each engine once, though several pieces use it."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, piece in found["pieces"].items():
        facts, (kind, _, label) = piece["facts"], name.partition("/")
        for engine, made in facts.get("builds", {}).items():
            target, _, component = engine.partition("/")
            own = kind == target  # the piece that is about this engine
            first: Json = next((row for row in piece["rows"] if own and "load_s" in row), {})
            row = [
                label, target, component, _shown(facts.get("export_s") if own else None), _shown(made["builder_s"]),
                f"{made['engine_bytes'] / 1e6:,.1f}", _shown(first.get("load_s")), _shown(first.get("first_call_s")),
            ]  # fmt: skip
            if own or (label, engine) not in rows:
                rows[label, engine] = row
    heads = ("model", "target", "component", "export, s", "build, s", "MB", "load, s", "first call, s")
    return table(heads, list(rows.values()), left=3)


def queued(found: Json) -> list[str]:
    """Calls that nothing waits between, beside calls that are waited for."""
    alone = {_place(label, row): median(row["wall_seconds"]) for label, row in all_rows(found, "UNet step")}
    rows = [
        [label, row["way"], str(row["batch"]), str(row["size"]), _ms(median(row["wall_seconds"])),
         _ms(alone.get(_place(label, row)))]
        for label, row in all_rows(found, "queued")
    ]  # fmt: skip
    return table(("model", "way", "batch", "px", "each of 10, wall, ms", "one alone, wall, ms"), rows)


def parity(found: Json) -> list[str]:
    """Relative distance to eager float32 of the first, second and third call."""
    rows = [
        [label, row["way"], row.get("component", "unet"), *(_shown(one, ".2e") for one in row["errors"])]
        for label, row in all_rows(found, "parity")
    ]
    return table(("model", "way", "component", "first call", "second", "third"), rows, left=3)


def overhead(found: Json) -> list[str]:
    """What the runtime adds to the library's own call, on the device's clock and on the wall's."""
    rows = []
    runs = {(label, row["way"]): row["median_s"] for label, row in reversed(list(all_rows(found, "UNet step")))}
    for label, row in all_rows(found, "bare"):
        target, _, call = row["way"].partition(", ")
        if whole := runs.get((label, f"{target}, CUDA graphs")):
            added = whole - row["median_s"]
            rows.append([label, target, call, _ms(row["median_s"]), _limit(row)[1], _ms(whole), f"{added * 1e6:,.0f}",
                         f"{added / row['median_s']:.2%}"])  # fmt: skip
    heads = ("model", "target", "bare", "ms", "of the limit", "through the runtime, ms", "added, us", "share")
    return table(heads, rows, left=3)


def whole_images(found: Json) -> list[str]:
    """VAE decoding and images end to end."""
    rows = [
        [label, row["way"], what, str(row["size"]), _ms(row["median_s"], ",.1f"), *_limit(row), _gb_taken(row)]
        for what in ("image", "VAE decode")
        for label, row in all_rows(found, what)
    ]
    shown = table(("model", "way", "what", "px", "ms", "TFLOP/s", "of the limit", "GB taken"), rows, left=3)
    return [*shown, "", "The work of an image is that of its UNet steps alone; its time is all of it."] if shown else []


def loras(found: Json) -> list[str]:
    """Changes of weights, and what they cost each step."""
    rows = []
    steps = {(label, row["way"]): row["median_s"] for label, row in all_rows(found, "UNet step")}
    for label, row in all_rows(found, "LoRA"):
        both = [_ms(steps.get((label, f"{row['way']}: {when}"))) for when in ("before", "LoRA")]
        back = "exact" if row["exact_back"] else _shown(row["back"], ".1e")
        rows.append([label, row["way"], *(f"{one:,.2f}" for one in row["seconds"]), *both, back])
    heads = ("model", "way", "LoRA on, s", "off, s", "step before, ms", "with it, ms", "after it was taken off")
    return table(heads, rows)


def training(found: Json) -> list[str]:
    """Distillation steps."""
    rows = [
        [row["student"], row["way"], str(row["batch"]), f"{row['batch'] / row['median_s']:,.2f}",
         ratio_cell([row[key] for key in ("speedup", "speedup_low", "speedup_high")]),
         _shown(row["memory_gb"], ",.2f"), *_limit(row)]
        for _, row in all_rows(found, "training step")
    ]  # fmt: skip
    heads = ("student", "step", "batch", "images/s", "over the reference (95 %)", "GB", "TFLOP/s", "of the limit")
    return table(heads, rows)


def against_goals(found: Json) -> list[str]:
    """What was to be reached, and what was."""
    rows = [
        [goal.words, goal.wanted, goal.measured,
         "" if goal.value is None else "yes" if goal.met else f"no, {goal.gap}"]
        for goal in goals(found)
    ]  # fmt: skip
    return table(("goal", "wanted", "measured", "reached"), rows, left=1)


def not_measured(found: Json) -> list[str]:
    """Pieces that are missing or went wrong, in their own words, and ceilings that are not used."""
    rows = [["ceilings", f"not used: {precision}", why] for precision, why in implausible(found).items()]
    for name, piece in found["pieces"].items():
        if piece["state"] != "done" or piece["errors"]:
            said = "; ".join(f"{part}: {text}" for part, text in piece["errors"].items())
            rows.append([name, piece["state"], said[:1500] or NONE])
        if left_out := piece["facts"].get("left_out"):
            rows.append([name, "in part", f"time was short for {'; '.join(left_out)}"])
    return table(("piece", "state", "why"), rows, left=3)


SECTIONS: tuple[tuple[str, Callable[[Json], list[str]]], ...] = (
    ("What runs here", what_runs), ("The machine's limits", machine_limits), ("UNet steps", unet_steps),
    ("Calls in a row", queued), ("Engines", engines), ("Distance to eager float32", parity),
    ("The runtime over the bare library", overhead),
    ("Whole images, and the VAE", whole_images), ("LoRA", loras), ("Distillation steps", training),
    ("Goals", against_goals), ("Missing, failed, or in part", not_measured),
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
    lines += ["", f"{EXPLAINED} Of the limit: the least time that arithmetic or traffic takes, over the time measured."]
    for title, show in SECTIONS:
        if shown := show(found):
            lines += ["", f"## {title}", "", *shown]
    return lines
