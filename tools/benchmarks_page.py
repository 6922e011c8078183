"""Write docs/benchmarks.md and the README's table of results from benchmarks/.

    python tools/benchmarks_page.py            # write both
    python tools/benchmarks_page.py --check    # fail when one of them is not what the results say

KINDS says which rows of which file are shown, README_ROWS and STAIRS those of the README. The same results make the
same text, byte for byte.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from bench import PIECES
from bench_kit.results import NONE, ROOT, span
from gpu_bench.page import facts_of, goals
from gpu_bench.settings import FIGURES

from sdkd.core.console import markdown_table
from sdkd.core.files import read_json, write_bytes
from sdkd.errors import InputError, SdkdError

PAGE, README = "docs/benchmarks.md", "README.md"
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
COMMAND = "python tools/benchmarks_page.py"
GPU_COMMAND = "python tools/gpu_report.py"  # docs/gpu.md
UNKNOWN = "not recorded"
# Before that day, latents of half-precision engines were in float32, those of eager PyTorch in half precision.
HALF_LATENTS = "2026-11-29"
Json = Mapping[str, Any]
Rows = list[list[str]]


def faster(value: float, low: float | None = None, high: float | None = None, tie: bool = False) -> str:
    """A ratio of medians with its 95 % interval, if there is one; a tie where the interval holds 1."""
    if low is None or high is None:
        return f"{value:.2f}×"
    return f"{'tie' if tie else f'{value:.2f}×'} ({low:.2f}–{high:.2f})"


def likeness(row: Json, date: str) -> str:
    """The distance of a subject's images to its own eager float32, and whether they keep their rule."""
    close, verdict = row["against_eager"], row["verdict"]
    if verdict and row["precision"] != "fp32" and date < HALF_LATENTS:
        return "withdrawn"
    shown = "identical" if close["identical"] else f"{close['psnr_mean_db']:.1f} dB"
    return shown if not verdict or verdict["ok"] else f"{shown}: breaks its rule ({verdict['found']})"


def milliseconds(row: Json) -> str:
    """The median of a subject's UNet steps."""
    value = row["unet_step_ms"]["median"]
    return f"{value:,.0f} ms" if value >= 1000 else f"{value:.3g} ms"


def comparison(found: Json) -> Rows:
    """tools/bench.py: every subject that has an eager float32 of its own, against that one."""
    results, rows = {row["label"]: row for row in found["comparison"]["results"]}, []
    for label, row in results.items():
        if over := row["step_speedup"].get("eager"):
            ratio = faster(over["value"], over["low"], over["high"], over["tie"])
            close = likeness(row, found.get("date", ""))
            rows.append([label, milliseconds(results[over["over"]]), milliseconds(row), ratio, close])
    return rows


def training(found: Json) -> Rows:
    """tools/bench_train.py: the reference's step and ours."""
    rows = []
    for part in found["students"]:
        steps = {row["step"]: row for row in part["rows"]}
        own = steps["Trainer.step"]
        rates = [f"{row['images_per_second']:.3f} images/s" for row in (steps["reference"], own)]
        rows.append([part["student"], *rates, faster(own["speedup"], own["speedup_low"], own["speedup_high"])])
    return rows


def runtime(found: Json) -> Rows:
    """tools/bench_runtime.py: whole images, every way against the first of its piece."""
    pieces = [found[name] for name in found["runs"] if found[name] and "image_faster" in found[name][0]]
    pairs = [(piece[0], row) for piece in pieces for row in piece if row["image_faster"]]
    return [
        [*(one["way"] for one in pair), *(f"{one['seconds']:.1f} s" for one in pair), faster(*pair[1]["image_faster"])]
        for pair in pairs
    ]


def costs(found: Json, name: str, size: str) -> Rows:
    """tools/bench_export.py and tools/bench_build.py."""
    rows = [(part["model"], row) for part in found["models"] for row in part["rows"]]
    scales = (("seconds", 1, ".1f"), ("peak_rss_bytes", 1e9, ".2f"), (size, 1e6, ",.0f"))
    return [
        [model, row[name], "refused", NONE, NONE]
        if row.get("refused")
        else [model, row[name], *(f"{row[key] / unit:{form}}" for key, unit, form in scales)]
        for model, row in rows
    ]


def gpu_report(found: Json) -> Rows:
    """tools/gpu_report.py: its goals; InputError for a dry run, which measures nothing."""
    if found["dry_run"]:
        raise InputError("a dry run of tools/gpu_report.py measures nothing: keep it elsewhere, with --out")
    return [[goal.words, goal.wanted, goal.measured] for goal in goals(found)]


def ablation(found: Json) -> Rows:
    """tools/ablate_distillation.py: means over seeds, with the range."""
    names = (("noise_mse", ".4f"), ("held_out", ".0%"), ("shape_held_out", ".0%"))
    return [[row["student"], row["variant"], *(span(row[name], form) for name, form in names)] for row in found["rows"]]


FEW = ("1", "2", "4", "8")


def few_steps(found: Json) -> Rows:
    """tools/ablate_few_steps.py: captions right by number of steps, means over seeds, with the range."""
    usual = str(found["settings"]["sampling_steps"])
    return [
        [row["words"], *(span(row["steps"][n]["right"], ".0%") if n in row["steps"] else NONE for n in (*FEW, usual))]
        for row in found["rows"]
    ]


def rounding(found: Json) -> Rows:
    """tools/ablate_quantization.py: means over seeds, with the range."""
    names = (("right", ".0%"), ("teacher_psnr_db", ".1f"), ("float_psnr_db", ".1f"), ("worst", ".1%"))
    return [
        [row["words"], *(span(row[name], form) if name in row else NONE for name, form in names)]
        for row in found["rows"]
    ]


ATTRIBUTES = ("shape", "colour", "background", "size", "position")


def accuracy(found: Json) -> Rows:
    """benchmarks/demo-teacher/measure.py: the share of images that are as their captions say."""
    return [
        [f"{found[name]['count']} {words}", *(f"{found[name]['accuracy'][head]:.1%}" for head in ATTRIBUTES)]
        for name, words in (("seen", "of combinations it has seen"), ("held_out", "of combinations held out"))
    ]


def decoder(found: Json) -> Rows:
    """tools/bench_decoder.py: seconds of an image, the full decoder and the small one."""
    return [
        [row["way"], f"{row['full_seconds']:.2f} s", f"{row['small_seconds']:.3f} s", faster(*row["faster"])]
        for row in found["rows"]
    ]


def eight_bits(found: Json) -> Rows:
    """tools/bench_int8.py: seconds of a UNet call, every engine against its target's first."""
    return [
        [row["model"], row["way"], f"{row['seconds']:.3g} s", faster(*row["faster"]) if row["faster"] else NONE]
        for row in found["rows"]
        if row["what"] == "call"
    ]


def eight_bit_images(found: Json) -> Rows:
    """tools/bench_int8_quality.py: images of every model in float and on engines in int8."""
    rows = []
    for row in found["rows"]:
        close = [NONE if row[name] is None else f"{row[name]:.1f}" for name in ("psnr_mean_db", "psnr_min_db")]
        rounding = row["rounding"]
        worst = f"{max(call['relative'] for call in rounding['quality']['engine']):.2%}" if rounding else NONE
        rows.append([row["subject"], f"{row['right']:.1%}", *close, worst])
    return rows


def staircase(found: Json) -> Rows:
    """tools/bench_staircase.py: every row of the staircase."""
    return [[stair["change"], *_stair(stair)] for stair in found["comparison"]["staircase"]]


def _stair(stair: Json) -> list[str]:
    close, peak = stair["to_first"], stair["peak_bytes"]
    far = NONE if close is None else "identical" if close["identical"] else f"{close['psnr_mean_db']:.1f} dB"
    return [
        f"{stair['image_s']:.3g} s", *(_gain(stair[name]) for name in ("over_previous", "over_first")),
        f"{stair['vae_share']:.0%}", NONE if peak is None else f"{peak / 1e6:,.0f}",
        f"{stair['parameters'] / 1e6:,.1f}", far,
    ]  # fmt: skip


def _gain(gain: Json | None) -> str:
    """A factor, with its interval where rounds were enough for one."""
    return NONE if gain is None else faster(*(gain[name] for name in ("value", "low", "high", "tie")))


def caching(found: Json) -> Rows:
    """tools/bench_caching.py: every model, target and cache interval."""
    return [
        [
            row["subject"],
            str(row["interval"]),
            f"{row['image_s']:.3g} s",
            faster(*row["faster"]) if row["faster"] else NONE,
            "identical"
            if row["identical"]
            else NONE
            if row["psnr_mean_db"] is None
            else f"{row['psnr_mean_db']:.1f} dB",
            NONE if row["right"] is None else f"{row['right']:.1%}",
        ]
        for row in found["rows"]
    ]


def serving(found: Json) -> Rows:
    """tools/bench_serve.py: requests one at a time and by many clients; other pieces are in the file's own page."""
    load = found["pieces"].get("load")
    if load is None:
        return []
    late, rate = load["latency_s"], load["images_per_second"]

    def like(name: str) -> str:
        compared = load[f"{name}_to_generate"]
        return f"{compared['identical']} of {compared['images']}, within {compared['largest_difference']} of 255"

    seconds = ", ".join(f"{late[part]:.2f}" for part in ("p50", "p95", "p99"))
    return [
        [found["about"], "one at a time", f"{rate['alone']:.2f}", NONE, NONE, like("alone")],
        [found["about"], f"{load['clients']} clients", f"{rate['together']:.2f}", faster(*load["faster"]), seconds,
         like("together")],
    ]  # fmt: skip


def demo_decoder(found: Json) -> Rows:
    """tools/train_demo_decoder.py: the demo's small VAE beside its full one."""
    full, small = (found[name]["decoder_macs"] / 1e6 for name in ("full", "small"))
    shown = (f"{found['psnr_mean_db']:.1f} dB ({found['psnr_min_db']:.1f})", f"{found['ssim_mean']:.3f}")
    return [[f"{found['images']} held out", *shown, f"{full:.0f}", f"{small:.0f}"]]


@dataclass(frozen=True)
class Kind:
    """Files whose path under benchmarks/ matches `pattern`, and the rows that are shown of them in one table."""

    pattern: str
    show: Callable[[Json], Rows] | None  # None: raw samples of another file
    heads: tuple[str, ...] = ()
    left: int = 2  # columns that hold words
    made: str = ""  # date, commit and command, where a file does not say them


COMPARED = ("subject", "own eager", "UNet step", "faster (95 %)", "images to own eager")
CLIMBED = ("change", "an image", "over the row above", "over the first", "VAE", "peak MB", "M params", "to the first")
CACHED = ("step caching of", "cache interval", "an image", "faster (95 %)", "to every step", "captions right")
SERVED = ("served", "asked", "images/s", "faster (95 %)", "latency p50, p95, p99, s", "identical to `sdkd generate`")
COST = ("s", "peak memory, GB", "files, MB")
ABLATED = ("student", "losses", "noise MSE", "captions right", "shapes right")
FEWER = ("captions right", *(f"{count} step{'' if count == '1' else 's'}" for count in FEW), "25 steps, guided")
EIGHT = ("simulated in PyTorch", "captions right", "dB to the teacher", "dB to itself in float", "largest error")
ROUNDED_IMAGES = ("images", "captions right", "dB to eager float32", "worst", "largest error of a prediction")
DECODED = ("drawings", "PSNR to the full VAE's, mean (worst)", "SSIM", "MMACs, full decoder", "small")
DECODER_COMMAND = "python tools/train_demo_decoder.py --work artifacts/demo-decoder"
KINDS = (
    *(Kind(f"*/{piece}.json", comparison, COMPARED) for piece in PIECES),
    Kind("*/train-*.json", training, ("student", "reference's step", "`Trainer.step`", "faster (95 %)")),
    Kind("*/export.json", partial(costs, name="way", size="bytes"), ("model", "way", *COST), left=3),
    Kind("*/build*.json", partial(costs, name="target", size="engine_bytes"), ("model", "target", *COST), left=3),
    Kind("*/runtime*.json", runtime, ("from", "to", "an image", "then", "faster (95 %)"), left=3),
    Kind("*/[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]*.json", gpu_report, ("goal", "wanted", "measured")),
    Kind("ablation-demo/ablation.json", ablation, ABLATED, 3, "`python tools/ablate_distillation.py`; commits: runs/"),
    Kind("ablation-demo/runs/*.json", None),
    Kind("ablation-demo/why.json", None),
    Kind("ablation-few-steps/ablation.json", few_steps, FEWER, 1, "`python tools/ablate_few_steps.py`; commits: runs/"),
    Kind("ablation-few-steps/runs/*.json", None),
    Kind(
        "ablation-quantization/ablation.json",
        rounding,
        EIGHT,
        1,
        "`python tools/ablate_quantization.py`; commits: runs/",
    ),
    Kind("ablation-quantization/runs/*.json", None),
    Kind("demo-teacher/accuracy.json", accuracy, ("captions", *ATTRIBUTES)),
    Kind("*/staircase-*.json", staircase, CLIMBED),
    Kind("*/caching.json", caching, CACHED),
    Kind("*/serve*.json", serving, SERVED),
    Kind("*/decoder.json", decoder, ("decoded on", "full VAE", "small VAE", "faster (95 %)")),
    Kind("*/int8.json", eight_bits, ("UNet of", "engine", "a call", "faster than its target's first (95 %)")),
    Kind("*/int8-quality.json", eight_bit_images, ROUNDED_IMAGES, 1),
    Kind("demo-decoder/likeness.json", demo_decoder, DECODED, 2, f"`{DECODER_COMMAND}`"),
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


# The README's rows: words, file, the words of the row that is shown, and its piece where a file holds several.
MACHINE = "benchmarks/amd-epyc-avx512-bf16-2-cores"
README_ROWS = (
    ("a UNet step of SD 1.5: eager fp32, `openvino` bf16", "sd15.json", ("openvino bf16",), ""),
    ("a UNet step of SD 1.5: eager fp32, `onnxruntime` fp32", "sd15.json", ("onnxruntime fp32",), ""),
    ("an image of 4 steps: SD 1.5 in eager fp32, SD-Tiny on `openvino` bf16", "runtime.json",
     ("teacher, eager fp32", "student, openvino-bf16"), "teacher"),
    ("distilling SD-Tiny at 256 px: the reference trainers' step, `Trainer.step`", "train-256-tiny.json",
     ("tiny",), ""),
)  # fmt: skip


STAIRS = "staircase-sd15.json"
CLIMB = "an image: SD 1.5 in eager fp32, 25 guided steps; SD-Tiny, 4 steps, a small decoder, `openvino` bf16"


def _climbed(found: Json) -> list[str]:
    """The first row of a staircase and that of CLIMB, the last where there is none of int8 below it; images of its
    models, which were never trained, mean nothing.
    """
    first, *others = found["comparison"]["staircase"]
    last = next((row for row in others if row["change"] == "openvino-bf16"), others[-1])
    return [f"{first['image_s']:.3g} s", f"{last['image_s']:.3g} s", _gain(last["over_first"]), NONE]


def readme_block(root: Path) -> str:
    """The README's table of results with file, commit and command of each."""
    rows, sources, machines = [], {}, set()
    for words, name, shown, piece in README_ROWS:
        found = read_json(root / MACHINE / name)
        rows.append([words, *_cells(found, name, shown), f"[{name}]({MACHINE}/{name})"])
        made = found["runs"][piece] if piece else found
        sources[name] = f"{name}: commit `{made['commit']}`, `{made['command']}`."
        machines.add(device(environment_of(found)))
    found = read_json(root / MACHINE / STAIRS)
    rows.append([CLIMB, *_climbed(found), f"[{STAIRS}]({MACHINE}/{STAIRS})"])
    sources[STAIRS] = f"{STAIRS}: commit `{found['commit']}`, `{found['command']}`."
    _, bf16, ratio, _ = _cells(read_json(root / MACHINE / "sd15.json"), "sd15.json", ("eager bf16",))
    where = (
        f"{'; '.join(sorted(machines))}; full-size shapes, random weights, 512 px where not said, medians. The UNet "
        f"step in eager bf16 takes {bf16}: {ratio}."
    )
    heads = ("measured: baseline, sdkd", "baseline", "sdkd", "faster (95 %)", "images to eager", "file")
    return "\n".join([*markdown_table(heads, rows), "", where, *sources.values()])


def _cells(found: Json, name: str, words: tuple[str, ...]) -> list[str]:
    """What follows these words in a result's rows."""
    kind = kind_of(Path(MACHINE).relative_to("benchmarks") / name)
    assert kind.show is not None
    cells = next(row[len(words) :] for row in kind.show(found) if tuple(row[: len(words)]) == words)
    return [*cells, NONE][:4]  # no images were compared in the last ones


def device(environment: Json) -> str:
    """The machine in words."""
    if not environment:
        return UNKNOWN
    gpu = environment.get("gpu")
    names = [gpu["gpu"], f"driver {environment['gpu_driver']}", f"CUDA {environment['cuda']}"] if gpu else []
    return ", ".join([*names, environment["cpu"], f"{environment['cores_usable']} cores"])


def source(path: Path, found: Json, kind: Kind) -> str:
    """File, date, commit and command of a result."""
    commands = dict.fromkeys(each["command"] for each in found.get("runs", {}).values()) or [found.get("command")]
    made = kind.made or (
        f"{found.get('date', 'date ' + UNKNOWN)}, commit {found.get('commit', UNKNOWN)}, "
        f"{', '.join(f'`{each}`' for each in commands)}"
    )
    told = f" ([in words]({_link(path.with_suffix('.md'))}))" if path.with_suffix(".md").is_file() else ""
    return f"- [{path.name}]({_link(path)}){told}: {made}"


def _link(path: Path) -> str:
    return f"../benchmarks/{'/'.join(path.parts[-2:])}"


def shown(path: Path, kind: Kind, found: Json) -> Rows:
    """The rows of one result; InputError when the file lacks what its kind has."""
    assert kind.show is not None
    try:
        return [[path.stem, *row] for row in kind.show(found)]
    except (LookupError, TypeError, AttributeError, StopIteration) as error:
        raise InputError(
            f"file '{'/'.join(('benchmarks', *path.parts[-2:]))}' is not as tools/benchmarks_page.py expects it "
            f"({error!r}): measure again, or change the function that shows it"
        ) from error


def machine_section(folder: str, results: Sequence[tuple[Path, Kind, Json]]) -> str:
    """The results of one folder: one table for each kind of file, then where each comes from."""
    machines = dict.fromkeys(device(environment_of(found)) for _, _, found in results)
    parts = [f"## {folder}", f"Measured on: {'; '.join(machines)}."]
    for heads, group in groupby(results, key=lambda result: result[1].heads):
        same = list(group)
        rows = [row for path, kind, found in same for row in shown(path, kind, found)]
        parts.append("\n".join(markdown_table(("file", *heads), rows, same[0][1].left)))
    return "\n\n".join([*parts, "\n".join(source(path, found, kind) for path, kind, found in results)])


def environment_of(found: Json) -> Json:
    """Where it was measured, empty when the file does not say."""
    environment: Json = found.get("environment") or found.get("comparison", {}).get("environment") or {}
    return environment


def on_gpu(results: Sequence[Json]) -> set[str]:
    """Which of FIGURES the results have from a GPU: targets of comparisons, and kinds of the GPU report's pieces."""
    measured = set[str]()
    for found in [found for found in results if environment_of(found).get("gpu")]:
        pieces = found.get("pieces", {})
        compared = [found["comparison"]] if "comparison" in found else []
        compared += [report for _, report in facts_of({"pieces": pieces}, "comparison")]
        rows = [row for report in compared for row in report["results"]]
        measured |= {row["target"].removesuffix(f"-{row['precision']}") for row in rows}
        done = {name for name, piece in pieces.items() if piece["rows"] or "comparison" in piece["facts"]}
        measured |= {name.partition("/")[0] for name in done} | ({"train"} if "students" in found else set())
    return measured


def gpu_section(results: Sequence[Json]) -> str:
    """What is not measured on a GPU yet; empty when all is."""
    measured = on_gpu(results)
    missing = [f"- `{name}`: {words}" for name, words in FIGURES.items() if name not in measured]
    words = f"One call measures all of it, or some with `--pieces`: `{GPU_COMMAND}` ([gpu.md](gpu.md))."
    return "\n".join(["## Not measured on a GPU yet", "", words, "", *missing]) if missing else ""


def whole_page(root: Path) -> str:
    """The page of all results under `root`/benchmarks."""
    folder = root / "benchmarks"
    found = [(path, kind_of(path.relative_to(folder)), read_json(path)) for path in sorted(folder.rglob("*.json"))]
    results = sorted((each for each in found if each[1].show), key=lambda each: (each[0].parent, KINDS.index(each[1])))
    parts = [
        "# Benchmarks",
        f"<!-- Written by {COMMAND} from benchmarks/**/*.json: change those, not this page. -->",
        "The rows that matter of every result under [benchmarks/](../benchmarks), medians. The JSON files hold the raw "
        "samples and the versions of libraries. `sd15`, `sd15-small` and `sd15-tiny` are full-size models with random "
        "weights. Withdrawn are images of half-precision engines that had latents in float32 while eager ones were in "
        "half precision: both are in half precision now, and were not measured again. Withdrawn, too, are intervals of "
        "whole images' ratios where subjects did not fit into memory together: until 2026-12-01 their images were "
        "timed one subject after the other, not in rounds. `make test` fails when "
        f"`{COMMAND}` would write another page. What others published: "
        "[peers.md](peers.md).",
        *(machine_section(name, list(group)) for name, group in groupby(results, lambda result: result[0].parent.name)),
        gpu_section([found for _, _, found in results]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def texts(root: Path) -> dict[Path, str]:
    """What each page has to say."""
    made = {root / PAGE: whole_page(root)}
    if (readme := root / README).is_file():
        text = readme.read_text(encoding="utf-8")
        start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
        made[readme] = f"{text[:start]}\n{readme_block(root)}\n{text[end:]}"
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a page is not current")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder that holds benchmarks/, docs/, README.md")
    asked = parser.parse_args(arguments)
    try:
        made = texts(asked.root)
    except SdkdError as error:
        raise SystemExit(f"error: {error}") from error
    for page, text in made.items():
        if not asked.check:
            write_bytes(page, text.encode())
        elif not page.is_file() or page.read_text(encoding="utf-8") != text:
            place = page.relative_to(asked.root).as_posix()
            raise SystemExit(f"error: {place} is not what benchmarks/ says: run `{COMMAND}` and keep what it writes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
