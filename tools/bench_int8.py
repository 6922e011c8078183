"""Engines of eight bits beside float ones: seconds of a UNet call, paired, where they go, and what builds take.

    python tools/bench_int8.py                                    # onnxruntime, openvino and builds of tensorrt-rtx
    python tools/bench_int8.py --models demo --targets openvino --rounds 9

One UNet call, batch 2, at the model's own size: rounds over all precisions of a target, every target and model in a
process of its own. What is asked of a calibration is little (--images, --steps): its quality is not measured here, and
engines are kept whether they are faster or not. ONNX Runtime's own profile says which operators take how long.
TensorRT-RTX builds without a GPU: seconds, size and layers alone. Writes benchmarks/<machine>/int8.json (raw samples)
and int8.md. Run it on a quiet machine.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_kit.record import Record
from bench_kit.results import (
    NONE,
    ROOT,
    check_known,
    command_of,
    faster,
    head,
    in_turn,
    keep,
    machine,
    parse,
    ratio_cell,
    slug,
)  # fmt: skip
from bench_kit.runner import Piece, Place, python_path, run_one

from sdkd.core.console import markdown_table
from sdkd.core.files import read_json
from sdkd.targets.nvidia import gpu
from sdkd.targets.registry import check_target, cpu_precisions

TARGETS: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
    "tensorrt-rtx": ("fp16", "int8", "fp8"),
}
BATCH, TOKENS, TIMESTEP = 2, 77, 500.0
WARM_UP, PROFILED = 2, 3  # calls
OPERATORS = 8  # shown of a profile
FASTER = {"faster": "faster than its target's first", "than_half": "than its bf16"}


def precisions(target: str) -> list[str]:
    """A target's, of those that this CPU has units for."""
    absent = {"bf16"} - cpu_precisions() if target == "openvino" else set()
    return [name for name in TARGETS[target] if name not in absent]


def shapes(bundle: Any) -> Any:
    """One image of the model's own size."""
    from sdkd.core.contract import native_size
    from sdkd.core.profiles import Range, ShapeRanges

    size = native_size(bundle.config("unet"), bundle.vae_config())
    assert size is not None, "the model does not say its size"
    return ShapeRanges(*(Range.fixed(number) for number in (1, *size, TOKENS)))


def built(record: Record, model: str, target: str, images: int, steps: int, work: Path) -> tuple[Path, dict[str, str]]:
    """The model's bundle with a UNet engine of every precision, and their slots; a row of each build."""
    from export.build.calibrate import CalibrationWish, calibration_file
    from export.build.engines import build_engine
    from export.pipeline import export_pipeline
    from sdkd.bundle.manifest import Bundle
    from sdkd.models.resolve import resolve
    from sdkd.targets.plan import plan_for_model

    plans, name = [plan_for_model(target, one) for one in precisions(target)], Path(model).name.replace(":", "-")
    (graph,) = {plan.onnx for plan in plans}
    folder, slots = work / f"{name}-{graph}", dict[str, str]()
    if not (folder / "bundle.json").is_file():
        export_pipeline(resolve(model), folder, precision=graph, verify=False)
    recorded = calibration_file(work / f"{name}-fp32")  # of the same weights
    wish = CalibrationWish(file=recorded) if recorded.is_file() else CalibrationWish(images=images, steps=steps)
    for plan in plans:
        with record.part(f"{model} {plan.slot}"):
            bundle = build_engine(
                folder, target, precision=plan.precision, ranges=shapes(Bundle.open(folder)), components=["unet"],
                calibration=wish, keep_slower=True,
            )  # fmt: skip
            slots[plan.precision] = plan.slot
            facts = facts_of(bundle, plan.slot)
            record.row(what="build", model=model, way=plan.slot, precision=plan.precision, **facts)
    return folder, slots


def facts_of(bundle: Any, slot: str) -> dict[str, Any]:
    """What the record of a UNet's engine says of its build and of its rounding."""
    engine = bundle.engine(slot, "unet")
    flags, floats = engine.flags, engine.flags.get("float_layers")
    quality = flags.get("quality") or {}
    errors = quality.get("engine") or quality.get("simulated") or []
    return {
        "build_seconds": engine.seconds, "bytes": engine.total_bytes, "rounded_layers": flags.get("rounded_layers"),
        "float_layers": None if floats is None else len(floats),
        "relative_error": max((row["relative"] for row in errors), default=None),
    }  # fmt: skip


def sessions(folder: Path, slots: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The engines' sessions by precision, and inputs for all of them."""
    import torch

    from engines.sessions.opening import open_session
    from export.build.ranges import Geometry, best_sizes
    from sdkd.bundle.manifest import Bundle

    bundle = Bundle.open(folder)
    contract = bundle.component("unet").contract
    sizes = {**best_sizes(contract, shapes(bundle), Geometry.of(bundle)), "batch": BATCH}
    generator, feeds = torch.Generator().manual_seed(0), {}
    for spec in contract.inputs:
        shape = spec.shape(sizes)
        values = torch.randn(shape, generator=generator) if shape else torch.tensor(TIMESTEP)
        feeds[spec.name] = values.to(spec.torch_dtype)
    return {precision: open_session(bundle, slot, "unet") for precision, slot in slots.items()}, feeds


def profile(engine: Path, feeds: Mapping[str, Any], work: Path) -> list[dict[str, Any]]:
    """Seconds of a call by operator, by ONNX Runtime's own profile, the longest first."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(work / "profile")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(engine), options, providers=["CPUExecutionProvider"])
    for _ in range(1 + PROFILED):
        session.run(None, {name: value.numpy() for name, value in feeds.items()})
    file = Path(session.end_profiling())
    events = read_json(file)
    file.unlink()
    return by_operator(events, PROFILED)


def by_operator(events: Sequence[Mapping[str, Any]], calls: int) -> list[dict[str, Any]]:
    """Of a profile's events the last `calls` of each node, summed by operator: seconds and nodes of one call."""
    nodes: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, str] = {}
    for event in events:
        if event.get("cat") == "Node" and str(event["name"]).endswith("_kernel_time"):
            nodes[event["name"]].append(event["dur"] / 1e6)
            kinds[event["name"]] = event["args"]["op_name"]
    found: dict[str, list[float]] = defaultdict(list)
    for name, seconds in nodes.items():
        found[kinds[name]].append(sum(seconds[-calls:]) / calls)
    rows = [{"operator": kind, "seconds": sum(each), "nodes": len(each)} for kind, each in found.items()]
    return sorted(rows, key=lambda row: -float(row["seconds"]))


def measure(record: Record, model: str, target: str, rounds: int, images: int, steps: int, work: str) -> None:
    """One target and model: the builds, and seconds of a call of each engine in turn."""
    import torch

    place = Path(work)
    folder, slots = built(record, model, target, images, steps, place)
    if check_target(target).runs_on_gpu and gpu() is None:
        return
    opened, feeds = sessions(folder, slots)
    samples: dict[str, list[list[float]]] = {name: [] for name in opened}
    with torch.inference_mode():
        for session in opened.values():
            for _ in range(WARM_UP):
                session.run(feeds)
        for _, name in in_turn(list(opened), rounds):
            start = time.perf_counter()
            opened[name].run(feeds)
            samples[name].append([time.perf_counter() - start])
    first, half = samples[next(iter(samples))], samples.get("bf16")
    for name, found in samples.items():
        record.row(
            what="call", model=model, way=slots[name], precision=name, batch=BATCH,
            seconds=statistics.median(one for (one,) in found),
            faster=None if found is first else faster(first, found),
            than_half=faster(half, found) if half and name == "int8" else None, samples=found,
        )  # fmt: skip
    if target == "onnxruntime":
        for name, session in opened.items():
            operators = profile(session.checked.path, feeds, place)
            record.row(what="profile", model=model, way=slots[name], precision=name, operators=operators)


def page(found: Mapping[str, Any]) -> list[str]:
    """The tables for people."""
    kinds: dict[str, list[Any]] = defaultdict(list)
    for row in found["rows"]:
        kinds[row["what"]].append(row)
    calls = [
        [row["model"], row["way"], f"{row['seconds']:.3f}", *(ratio_cell(row.get(than)) for than in FASTER)]
        for row in kinds["call"]
    ]
    lines = [
        "# Engines of eight bits",
        "",
        f"Measured on {found['machine']}, {found['date']}, commit {found['commit']}.",
        "",
        f"One UNet call, batch {BATCH}, at the model's own size; random weights unless it is the demo.",
        "",
        *markdown_table(("model", "on", "a call, s", *FASTER.values()), calls, left=2),
        "",
        "Medians; ratios with a 95 % bootstrap interval over paired rounds.",
        "",
        "## Builds",
        "",
        *markdown_table(
            ("model", "for", "s", "MB", "layers rounded", "float", "error"),
            [_build_cells(row) for row in kinds["build"]],
            left=2,
        ),
        "",
        "Seconds hold the gate, which times both, but no calibration. Error: of a noise prediction, relative, at the "
        "worst timestep; by the engine where it runs here, else by PyTorch.",
    ]
    for row in kinds["profile"]:
        shown = [[one["operator"], str(one["nodes"]), f"{one['seconds']:.4f}"] for one in row["operators"][:OPERATORS]]
        table = markdown_table(("operator", "nodes", "s of a call"), shown)
        lines += ["", f"## Where {row['way']} spends a call of {row['model']}", "", *table]
    if found["errors"]:
        lines += ["", "## What failed", "", *(f"- {name}: {error}" for name, error in found["errors"].items())]
    return lines


def _build_cells(row: Mapping[str, Any]) -> list[str]:
    counts = [NONE if row[name] is None else str(row[name]) for name in ("rounded_layers", "float_layers")]
    error = NONE if row["relative_error"] is None else f"{row['relative_error']:.3f}"
    return [row["model"], row["way"], f"{row['build_seconds']:.1f}", f"{row['bytes'] / 1e6:,.0f}", *counts, error]


def main() -> None:
    """Measure and write."""
    asked = parse(
        __doc__, models="demo,random:sd15-tiny,random:sd15-small", targets=",".join(TARGETS), rounds=7, images=1,
        steps=2, work=ROOT / "artifacts" / "bench-int8",
    )  # fmt: skip
    targets = asked.targets.split(",")
    check_known("target", targets, TARGETS)
    given = {"rounds": asked.rounds, "images": asked.images, "steps": asked.steps, "work": str(asked.work)}
    place = Place(asked.work, python_path(), logged=False)
    command = command_of("bench_int8.py", asked, "models", "targets", "rounds", "images", "steps")
    rows: list[dict[str, Any]] = []
    errors: dict[str, str] = {}
    for model in asked.models.split(","):
        for target in targets:
            piece = Piece(f"{target}/{slug(model)}", "bench_int8:measure", {"model": model, "target": target, **given})
            result = run_one(piece, place)
            rows += result["rows"]
            errors |= result["errors"]
            found = {**head(command), "rows": rows, "errors": errors}  # what was measured is not lost with the rest
            keep(asked.output / machine() / "int8.json", found, page(found))


if __name__ == "__main__":
    main()
