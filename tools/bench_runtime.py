"""The runtime against what runs inside it, against eager PyTorch, and against Optimum's pipeline: paired, samples kept.

    python tools/bench_runtime.py                                         # everything that this machine can run
    python tools/bench_runtime.py --pieces overhead,onnxruntime           # some pieces; the others' results stay

overhead        denoising steps inside a pipeline; in each, the library's bare call on the same tensors before or after
onnxruntime     whole images of the student: eager fp32 and this engine; the same for openvino, openvino-bf16
peer            whole images: our onnxruntime engines and Optimum's ORTStableDiffusionPipeline on the same ONNX files
teacher         whole images: the eager teacher and the student's engines
openvino-peers  whole images: OpenVINO GenAI, Optimum on OpenVINO and our engines of the same ONNX files, all for one
                size; the same for openvino-bf16-peers
sdcpp-peer      whole images: stable-diffusion.cpp with weights in float32 and in float16, and our openvino engines

Whole images are comparisons by `sdkd.compare`, every way in a process of its own; Optimum's in its own environment,
.venv-interop, the other peers and ours beside them in .venv-peers. By default models have the shapes of Stable
Diffusion 1.5 and random weights. Writes benchmarks/<machine>/runtime.json and .md, or those of `--result`. Run it on a
quiet machine; with two cores and 24 GB one piece at a time fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_kit.commands import interop_python, optimum_versions
from bench_kit.overhead import measure_overhead, overhead_lines, overhead_row
from bench_kit.record import Record
from bench_kit.results import NONE, ROOT, check_known, command_of, head, keep, machine, parse, ratio_cell
from bench_kit.runner import CHILD, Piece, Place, python_path, run_or_exit

from sdkd.core.console import markdown_table
from sdkd.core.files import read_json
from sdkd.core.profiles import Range, ShapeRanges
from sdkd.targets.plan import plan_for_model
from sdkd.targets.registry import cpu_precisions

if TYPE_CHECKING:
    from sdkd.compare import Subject

SCHEMA = 2
DEMO = {"num_inference_steps": 30, "height": 64, "width": 64}
DEMO_IMAGES = 10
SETTINGS = ("steps", "size", "teacher", "student")  # results of other settings are not mixed
SLOTS = {"onnxruntime": "fp32", "openvino": "fp32", "openvino-bf16": "bf16"}
TIMED = ("image_s", "unet_step_ms", "text_encoder_ms", "vae_decode_ms")
# Pieces, and the slot of ours in them; the others in each, with their precision where it is not that of ours.
PEERS = {"openvino-peers": "openvino", "openvino-bf16-peers": "openvino-bf16", "sdcpp-peer": "openvino"}
_OPENVINO = (("openvino-genai", None), ("optimum-intel", None))
OTHERS: Mapping[str, Sequence[tuple[str, str | None]]] = {
    "openvino-peers": _OPENVINO,
    "openvino-bf16-peers": _OPENVINO,
    "sdcpp-peer": (("stable-diffusion-cpp", "fp32"), ("stable-diffusion-cpp", "fp16")),
}
PEER_PACKAGES = (
    "openvino-genai", "optimum-intel", "stable-diffusion-cpp-python", "openvino", "optimum", "torch", "diffusers",
    "transformers",
)  # fmt: skip
PEER_ENVIRONMENT = ROOT / ".venv-peers", ROOT / "tools" / "bench_kit" / "peers.txt"
WITHDRAWN = (
    "Ratios of images have no interval: the ways did not fit into memory together, and their images were timed one way",
    "after the other, not in rounds (intervals withdrawn on 2026-12-01).",
)
PIECES = ("overhead", *SLOTS, "peer", *PEERS, "teacher", "attention")  # the last one is only read: of earlier results


def slots() -> list[str]:
    """Slots that this CPU has units for."""
    return [name for name, kind in SLOTS.items() if kind in cpu_precisions() | {"fp32"}]


def bundle_of(work: str, model: str, slot: str, size: int, made: bool = False) -> Path:
    """A model's bundle with the engines of one slot for single images of one size; built where missing, unless `made`.

    Optimum's environment, which cannot build, is told that they were made.
    """
    plan, folder = plan_for_model(slot, SLOTS[slot]), Path(work, f"{model.replace(':', '-').replace('/', '-')}-{size}")
    if made:
        return folder / plan.onnx
    from sdkd.workflow import prepare

    side = Range.fixed(size)
    ranges = ShapeRanges(Range.fixed(1), side, side, Range.fixed(77))
    return prepare(model, plan, folder, ranges=ranges).bundle


def overhead(record: Record, rounds: int, work: str, steps: int, size: int, student: str, **_: Any) -> None:
    """The demo model, whose steps are so short that overhead shows, and the student."""
    own = {"num_inference_steps": 2 * steps, "height": size, "width": size}
    calls = {"demo": (DEMO_IMAGES, DEMO)}
    calls.setdefault(student, (rounds, own))
    for model, (images, call) in calls.items():
        for slot in slots():
            samples = measure_overhead(bundle_of(work, model, slot, call["height"]), slot, images, call)
            record.row(**overhead_row(model, slot, samples))


# Whole images


def slots_of(piece: str) -> list[str]:
    """The student's engines in a piece; for `teacher` the fastest of ONNX Runtime's and OpenVINO's."""
    if piece == "teacher":
        return ["onnxruntime", slots()[-1]]
    return ["onnxruntime" if piece == "peer" else PEERS.get(piece, piece)]


def build(record: Record, piece: str, work: str, size: int, student: str, **_: Any) -> None:
    """Build what a piece compares, in this environment."""
    for slot in slots_of(piece):
        bundle_of(work, student, slot, size)


def images(
    record: Record, piece: str, rounds: int, work: str, steps: int, size: int, teacher: str, student: str
) -> None:
    """Whole images side by side: medians, and speed over the first way, with the images' PSNR to the first way's.

    `peer`: the same ONNX files by Optimum and by us, each with its own settings of ONNX Runtime. PEERS: by others and
    us. `teacher`: from the eager teacher to the student's engines. A slot: the student.
    """
    from sdkd.compare import Subject, compare
    from sdkd.compare.measure.quality import image_likeness

    made = piece == "peer" or piece in PEERS
    every = [
        Subject(f"student, {slot}", student, slot, SLOTS[slot], bundle_of(work, student, slot, size, made))
        for slot in slots_of(piece)
    ]
    base = Subject("student, eager fp32", student)
    if piece == "peer":
        every = [replace(every[0], label="onnxruntime")]
        base = replace(every[0], label="Optimum (same ONNX)", target="optimum")
    elif piece in PEERS:
        (ours,) = every
        base, *more = (other_way(ours, *one) for one in OTHERS[piece])
        every = [*more, ours]
    elif piece == "teacher":
        base = Subject("teacher, eager fp32", teacher)
    report = compare(
        [base, *every], prompts=["a lighthouse in a storm"], steps=steps, size=size, runs=rounds * steps, seed=1,
        min_seconds=0.0, image_runs=rounds, baseline=base.label, isolate=True,
        scheduler="ddim" if piece in PEERS else None,  # GenAI has few, and this one as diffusers has it
    )  # fmt: skip
    for row in report.to_json()["results"]:
        (own,), (first,) = (report.images[label] for label in (row["label"], base.label))
        record.row(**image_row(row, None if piece == "teacher" else image_likeness(own, first).psnr_db))


def other_way(ours: Subject, name: str, precision: str | None) -> Subject:
    """A peer on what our engines were built from."""
    found = replace(ours, label="-", target=name, precision=precision or ours.precision)
    bundle = None if found.in_torch else found.bundle
    return replace(found, label=found.runs_as if precision else name, bundle=bundle)


def image_row(row: Mapping[str, Any], psnr_db: float | None) -> dict[str, Any]:
    """Medians of one way, from a comparison's result, and how many times faster than its baseline it is."""

    def over(name: str) -> list[float] | None:
        ratio = row[name].get("baseline")
        return ratio and [ratio["value"], ratio["low"], ratio["high"]]

    return {
        "way": row["label"],
        "seconds": row["image_s"]["median"],
        "unet_step_seconds": row["unet_step_ms"]["median"] / 1e3,
        "outside_per_step_seconds": row["rest_ms"] / 1e3 / row["unet_calls"],
        "image_faster": over("image_speedup"),
        "unet_faster": over("step_speedup"),
        "psnr_db": psnr_db,
        "samples": {name: row[name]["samples"] for name in TIMED},
    }


# The result


def merged(
    before: Mapping[str, Any], new: Mapping[str, Any], piece: str, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A result with one more piece; pieces measured with other settings go."""
    same = before.get("schema") == SCHEMA and before.get("settings") == new["settings"]
    kept = dict(before) if same else {}
    run = {name: new[name] for name in ("date", "commit", "command")}
    theirs = {name: new.get(name) or kept.get(name) for name in ("optimum", "peers")}
    return {**kept, **new, **theirs, "runs": {**kept.get("runs", {}), piece: run}, piece: rows}


def page(found: Mapping[str, Any]) -> list[str]:
    """The tables for people."""
    lines = ["# The runtime", "", f"Measured on {found['machine']}, {found['date']}, commit {found['commit']}."]
    shown = {"overhead": overhead_lines, "attention": attention_lines}
    for name in [name for name in PIECES if name in found]:
        lines += ["", *shown.get(name, partial(image_lines, name, found["settings"]))(found[name])]
        run = found["runs"].get(name, {})
        if run and (run["commit"], run["date"]) != (found["commit"], found["date"]):
            lines += ["", f"Of {run['date']}, commit {run['commit']}."]
    return lines


def image_lines(piece: str, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of whole images."""
    cells = [
        [row["way"], f"{row['seconds']:.2f}", f"{row['unet_step_seconds'] * 1e3:,.0f}",
         f"{row['outside_per_step_seconds'] * 1e3:.1f}", ratio_cell(row["unet_faster"]),
         ratio_cell(row["image_faster"]), NONE if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"]
        for row in rows
    ]  # fmt: skip
    heads = ("way", "image, s", "UNet call, ms", "outside, ms per step", "UNet call", "image", "PSNR, dB")
    return [
        f"## Whole images, {piece}: {settings['steps']} steps, {settings['size']} px, guidance 7.5",
        "",
        *markdown_table(heads, cells),
        "",
        f"Times faster than {rows[0]['way']}: ratios of medians with a 95 % bootstrap interval over paired rounds.",
        "PSNR: of the image, to the first way's. Outside: what is neither UNet, VAE nor text encoder.",
        *(WITHDRAWN if any(len(row["image_faster"] or ()) == 1 for row in rows) else ()),
    ]


def attention_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of forms of attention, in a result that is there: the trial is in the history, at the commit that it names."""
    cells = [
        [f"{row['queries']} x {row['keys']} x {row['width']}", row["form"], f"{row['seconds'] * 1e3:,.1f}",
         ratio_cell(row["faster"])]
        for row in rows
    ]  # fmt: skip
    heads = ("queries x keys x width", "form", "ms", "faster than opset 23's")
    return ["## Attention in ONNX Runtime: batch 2, 8 heads, float32", "", *markdown_table(heads, cells, left=2)]


def main() -> None:
    """Measure and write, piece by piece: what is done stays when the rest is interrupted."""
    here = [piece for piece in PIECES if piece != "attention" and PEERS.get(piece, piece) not in {*SLOTS} - {*slots()}]
    asked = parse(
        __doc__, pieces=",".join(here), rounds=3, steps=4, size=512, teacher="random:sd15", student="random:sd15-tiny",
        work=ROOT / "artifacts" / "bench-runtime", result="runtime",
    )  # fmt: skip
    check_known("piece", asked.pieces.split(","), here)
    settings = {name: getattr(asked, name) for name in SETTINGS}
    command = command_of("bench_runtime.py", asked, "pieces", "rounds", "result", *SETTINGS)
    file, place = asked.output / machine() / f"{asked.result}.json", Place(asked.work, python_path(), logged=False)
    for name in asked.pieces.split(","):
        given = {"rounds": asked.rounds, "work": str(asked.work), **settings}
        optimum = peers = None
        where = place
        if name == "peer" or name in PEERS:
            run_or_exit(Piece(f"{name}-engines", "bench_runtime:build", {"piece": name, **given}), place)
            python = interop_python(*(PEER_ENVIRONMENT if name in PEERS else ()))
            where = replace(place, program=(str(python), *CHILD))
            optimum = optimum_versions(python) if name == "peer" else None
            peers = optimum_versions(python, PEER_PACKAGES) if name in PEERS else None
        piece = Piece(name, "bench_runtime:images", {"piece": name, **given})
        if name == "overhead":
            piece = Piece(name, "bench_runtime:overhead", given)
        rows = run_or_exit(piece, where)["rows"]
        new = {**head(command, settings=settings, optimum=optimum, peers=peers), "schema": SCHEMA}
        found = merged(read_json(file) if file.is_file() else {}, new, name, rows)
        keep(file, found, page(found))


if __name__ == "__main__":
    main()
