"""Write docs/benchmarks.md from the results under benchmarks/ and the figures of others in tools/peers.yaml.

    python tools/benchmarks_page.py            # write the page
    python tools/benchmarks_page.py --check    # fail when the page is not what the results say

Every figure of ours comes from a JSON file; KINDS says which function shows which file. The same results make the same
page, byte for byte.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from bench import PIECES, ROOT, brief
from gpu_bench.missing import GPU_COMMAND, GPU_ROWS, environment_of, on_gpu
from gpu_bench.page import over_reference

from sdkd.errors import InputError, SdkdError
from sdkd.files import read_json, write_bytes

PAGE = "docs/benchmarks.md"
COMMAND = "python tools/benchmarks_page.py"
PEERS = Path(__file__).with_name("peers.yaml")
UNKNOWN = "not recorded"
Json = Mapping[str, Any]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the columns after the first `left` hold numbers and stand to the right."""
    lines = [heads, ["---"] * left + ["---:"] * (len(heads) - left)]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (*lines, *cells))


def comparison(found: Json) -> tuple[str, str]:
    """A comparison of tools/bench.py: its own table and notes, and the builds of each model summed up."""
    title, _, text = brief(found["markdown"]).partition(". Measured on ")
    notes = [line for line in found["markdown"].splitlines() if line.startswith("- Note: ")]
    sums: dict[tuple[str, str], tuple[float, float]] = {}
    for row in found["builds"]:
        seconds, size = sums.get((row["model"], row["made"]), (0.0, 0))
        sums[row["model"], row["made"]] = (seconds + row["seconds"], size + row["bytes"])
    builds = [[*key, f"{seconds:.1f}", f"{size / 1e6:,.1f}"] for key, (seconds, size) in sorted(sums.items())]
    parts = [text.partition("\n\n")[2], *(["\n".join(notes)] if notes else [])]
    if builds:
        parts += [
            "Exports (`onnx-...`) and engine builds, all components of a model together:",
            table(("model", "made", "s", "MB"), builds, left=2),
        ]
    return title, "\n\n".join(parts)


def training(found: Json) -> tuple[str, str]:
    """A distillation step of tools/bench_train.py, whose own function would load torch."""
    students = ", ".join(part["student"] for part in found["students"])
    title = f"Distillation step of {students}: {found['size']} px, batch {found['batch_size']}, {found['precision']}"
    rows = [
        [
            part["student"],
            row["step"],
            f"{row['seconds_median']:.2f}",
            f"{row['images_per_second']:.3f}",
            over_reference(row),
        ]
        for part in found["students"]
        for row in part["rows"]
    ]
    words = "SD 1.5's shapes with random weights. Rows are cumulative up to `Trainer.step`, the trainer itself."
    heads = ("student", "step", "s", "images/s", "over the reference (95 %)")
    return title, f"{words}\n\n{table(heads, rows, left=2)}"


def of_tool(module: str) -> Callable[[Json], tuple[str, str]]:
    """The tables that a tool itself writes for people."""

    def show(found: Json) -> tuple[str, str]:
        text: str = importlib.import_module(module).markdown(found)
        title, _, body = text.partition("\n")
        body = body.partition("\nMade again by:")[0]
        lines = [f"#### {line[3:]}" if line.startswith("## ") else line for line in body.strip().splitlines()]
        return title.removeprefix("# "), "\n".join(lines)

    return show


def gpu_report(found: Json) -> tuple[str, str]:
    """A report of tools/gpu_report.py; InputError for a dry run, which measures nothing."""
    if found["dry_run"]:
        raise InputError("a dry run of tools/gpu_report.py measures nothing: keep it elsewhere, with --out")
    return of_tool("gpu_bench.page")(found)


def _range(values: Sequence[float], form: str) -> str:
    return f"{format(mean(values), form)} ({format(min(values), form)} to {format(max(values), form)})"


def ablation(found: Json) -> tuple[str, str]:
    """What each part of the distillation brings, over seeds."""
    settings = found["settings"]
    rows = [
        [
            row["student"],
            row["variant"],
            str(len(row["seeds"])),
            _range(row["noise_mse"], ".4f"),
            *(_range(row[name], ".0%") for name in ("held_out", "shape_held_out")),
        ]
        for row in found["rows"]
    ]
    words = (
        f"The embedded models, {settings['steps']} steps of {settings['batch_size']} images on a CPU; mean over seeds "
        "and range. Noise MSE is that between student and teacher; captions and shapes are the shares that a reader "
        f"finds right in images of {settings['scenes']} held-out captions."
    )
    heads = ("student", "variant", "seeds", "noise MSE", "captions", "shapes")
    return "What each part of the distillation brings", f"{words}\n\n{table(heads, rows, left=2)}"


def conditioning(found: Json) -> tuple[str, str]:
    """Why random conditioning does not help there."""
    shown = {name: each for name, each in found.items() if isinstance(each, Mapping) and "own" in each}
    rows = [[name, f"{each['own']:.4f}", f"{each['other']:.4f}"] for name, each in sorted(shown.items())]
    words = f"Noise MSE to the teacher, student {found['student']}, seed {found['seed']}."
    heads = ("variant", "images' own captions", "captions of other images")
    return "Random conditioning", f"{words}\n\n{table(heads, rows)}"


def accuracy(found: Json) -> tuple[str, str]:
    """How many images follow their captions."""
    names = {
        "seen": "the teacher's images of seen captions",
        "held_out": "the teacher's images of held-out captions",
        "reader_on_drawings": "the reader on drawings",
        "reader_on_vae_reconstructions": "the reader on drawings after the VAE",
    }
    heads = list(found["seen"]["accuracy"])
    rows = [
        [text, str(found[name]["count"]), *(f"{found[name]['accuracy'][head]:.1%}" for head in heads)]
        for name, text in names.items()
    ]
    words = f"{found['steps']} steps, guidance scale {found['guidance_scale']:g}, {found['scheduler']}."
    return "The embedded teacher: attributes as the caption says", f"{words}\n\n{table(['', 'images', *heads], rows)}"


@dataclass(frozen=True)
class Kind:
    """Files whose path under benchmarks/ matches `pattern`: their heading and body, and the command if they lack it."""

    pattern: str
    show: Callable[[Json], tuple[str, str]] | None  # None: raw samples of another file
    command: str = UNKNOWN


ABLATE = "python tools/ablate_distillation.py"
KINDS = (
    *(Kind(f"*/{piece}.json", comparison) for piece in PIECES),
    Kind("*/train-*.json", training),
    Kind("*/export.json", of_tool("bench_export")),
    Kind("*/build.json", of_tool("bench_build")),
    Kind("*/runtime.json", of_tool("bench_runtime")),
    Kind("*/[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]*.json", gpu_report),  # a day's second one ends in -2
    Kind("ablation-demo/ablation.json", ablation, ABLATE),
    Kind("ablation-demo/runs/*.json", None),
    Kind("ablation-demo/why.json", conditioning, f"{ABLATE} --why"),
    Kind("demo-teacher/accuracy.json", accuracy),
)


def kind_of(path: Path) -> Kind:
    """The kind of a path relative to benchmarks/; InputError for one that nobody shows."""
    for kind in KINDS:
        if len(path.parts) == kind.pattern.count("/") + 1 and path.match(kind.pattern):
            return kind
    raise InputError(
        f"file 'benchmarks/{path.as_posix()}' is of a kind that {PAGE} does not show: add a row for it to KINDS in "
        "tools/benchmarks_page.py"
    )


def device(environment: Json) -> str:
    """The machine in words."""
    if not environment:
        return UNKNOWN
    gpu = environment.get("gpu")
    names = [gpu["gpu"], f"driver {environment['gpu_driver']}", f"CUDA {environment['cuda']}"] if gpu else []
    names += [environment["cpu"], f"{environment['cores_usable']} cores", f"{environment['memory_total_gb']} GB"]
    return ", ".join([*names, environment["os"]])


def facts(found: Json, path: Path, kind: Kind, root: Path) -> str:
    """Device, versions, date, commit, command and files of a result."""
    page = root / PAGE
    environment = environment_of(found)
    runs = [read_json(run) for run in sorted(path.parent.glob("runs/*.json"))] if "commit" not in found else []
    commits = sorted({str(each["commit"]) for each in (found, *runs) if each.get("commit")})
    versions = dict(environment.get("versions") or found.get("versions") or {})
    if "python" in environment:
        versions = {"python": environment["python"], **versions}
    lines = [
        f"Device: {device(environment)}",
        f"Date: {found.get('date', UNKNOWN)}; commit: {', '.join(f'`{each}`' for each in commits) or UNKNOWN}",
        f"Versions: {_versions(versions)}",
        *([f"Optimum's environment: {_versions(found['optimum'])}"] if found.get("optimum") else []),
        f"Made again by: `{found.get('command', kind.command)}`",
        f"Data: {_link(path, page)}"
        + (f", explained in {_link(told, page)}" if (told := path.with_suffix(".md")).is_file() else ""),
    ]
    return "\n".join(f"- {line}" for line in lines)


def _versions(versions: Json) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or UNKNOWN


def _link(path: Path, page: Path) -> str:
    return f"[{path.name}]({Path(os.path.relpath(path, page.parent)).as_posix()})"


def section(path: Path, kind: Kind, found: Json, root: Path) -> str:
    """One result with all that is known of it; InputError when the file lacks what its kind has."""
    assert kind.show is not None
    try:
        title, body = kind.show(found)
        return f"### {title}\n\n{facts(found, path, kind, root)}\n\n{body}"
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"file '{path.relative_to(root).as_posix()}' is not as tools/benchmarks_page.py expects it ({error!r}): "
            "measure again, or change the function that shows it"
        ) from error


def gpu_section(results: Sequence[Json]) -> str:
    """What is not measured on a GPU yet; empty when all is."""
    measured = on_gpu(results)
    rows = [
        [words, "not measured yet", f"`{GPU_COMMAND} --pieces {name}`"]
        for words, name in GPU_ROWS
        if name not in measured
    ]
    if not rows:
        return ""
    words = f"One call measures all of it: `{GPU_COMMAND}` ([gpu.md](gpu.md))."
    return f"## On a GPU\n\n{words}\n\n" + table(("what", "figure", "measured by"), rows, left=3)


def peers_section(peers: Path) -> str:
    """What others published, in a table of its own."""
    rows = []
    try:
        for each in yaml.safe_load(peers.read_text(encoding="utf-8")):
            source = f"[{each['place']}]({each['source']})"
            for figure in each["figures"]:
                said = ", ".join(f"{name} {value}" for name, value in figure["published"].items())
                setting = f"{figure['model']}, {figure['setting']}"
                date = str(each["date"] or "not stated")
                rows.append([each["peer"], figure["device"], setting, f"{said} {each['unit']}", date, source])
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(f"file 'tools/{peers.name}' is not a list of published figures ({error!r})") from error
    words = (
        "Published by the named projects, on their machines, with their settings. None of it was measured here, and "
        "none of it can be set against the figures above: devices, versions, models and clocks differ."
    )
    heads = ("project", "device", "model and setting", "published", "date", "source")
    return f"## Published by others, not measured here\n\n{words}\n\n{table(heads, rows, left=6)}"


def whole_page(root: Path, peers: Path = PEERS) -> str:
    """The page of all results under `root`/benchmarks."""
    folder = root / "benchmarks"
    groups: dict[str, list[str]] = {}
    results = []
    for path in sorted(folder.rglob("*.json")):
        kind = kind_of(path.relative_to(folder))
        if kind.show is None:
            continue
        results.append(found := read_json(path))
        groups.setdefault(path.parent.name, []).append(section(path, kind, found, root))
    parts = [
        "# Benchmarks",
        f"<!-- Written by {COMMAND} from benchmarks/**/*.json and tools/{peers.name}: change those, not this page. -->",
        "Every figure of this project comes from a JSON file under [benchmarks/](../benchmarks), which holds the raw "
        f"samples, too; this page is made from them by `{COMMAND}`, and `make test` fails when it is not current. "
        f'"{UNKNOWN.capitalize()}" means that the file does not say.',
        *("\n\n".join([f"## {name}", *sections]) for name, sections in sorted(groups.items())),
        gpu_section(results),
        peers_section(peers),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when the page is not current")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder that holds benchmarks/ and docs/")
    asked = parser.parse_args(arguments)
    page = asked.root / PAGE
    try:
        text = whole_page(asked.root)
    except SdkdError as error:
        raise SystemExit(f"error: {error}") from error
    if not asked.check:
        write_bytes(page, text.encode())
    elif not page.is_file() or page.read_text(encoding="utf-8") != text:
        raise SystemExit(f"error: {PAGE} is not what benchmarks/ says: run `{COMMAND}` and keep what it writes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
