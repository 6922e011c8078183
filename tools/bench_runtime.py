"""The runtime against what runs inside it, against eager PyTorch, and against Optimum's pipeline: paired, samples kept.

    python tools/bench_runtime.py                                         # everything that this machine can run
    python tools/bench_runtime.py --pieces overhead,onnxruntime           # some pieces; the others' results stay

overhead        denoising steps inside a pipeline; in each, the library's bare call on the same tensors before or after
onnxruntime     whole images of the student: eager fp32 and this engine in turn; the same for openvino, openvino-bf16
peer            whole images: our onnxruntime engines and Optimum's ORTStableDiffusionPipeline on the same ONNX files
teacher         whole images: the eager teacher and the student's engines

What is compared takes turns, each in a process of its own that stays loaded. By default models have the shapes of
Stable Diffusion 1.5 and random weights. Writes benchmarks/<machine>/runtime.json and .md. Run it on a quiet machine;
with two cores and 24 GB one piece at a time fits.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench_kit.commands import interop_python, optimum_versions
from bench_kit.record import Record
from bench_kit.results import NONE, ROOT, faster, head, keep, machine, ratio_cell, table
from bench_kit.runner import Piece, Place, python_path, run_or_exit
from runtime_pipelines import Variant, take_turns

from sdkd.core.files import read_json
from sdkd.targets.registry import cpu_precisions

SCHEMA = 2
DEMO = {"num_inference_steps": 30, "height": 64, "width": 64}
DEMO_IMAGES = 10
SETTINGS = ("steps", "size", "teacher", "student")  # results of other settings are not mixed
SLOTS = {"onnxruntime": "fp32", "openvino": "fp32", "openvino-bf16": "bf16"}
PIECES = ("overhead", *SLOTS, "peer", "teacher", "attention")  # the last one is only read: of earlier results


def slots() -> list[str]:
    """Slots that this CPU has units for."""
    return [name for name, kind in SLOTS.items() if kind in cpu_precisions() | {"fp32"}]


def bundle_of(work: str, model: str, slot: str, size: int) -> Path:
    """A model's bundle with the engines of one slot for single images of one size, made where they are missing."""
    from sdkd.core.profiles import Range, ShapeRanges
    from sdkd.targets.plan import plan_for_model
    from sdkd.workflow import prepare

    side, folder = Range.fixed(size), Path(work, f"{model.replace(':', '-').replace('/', '-')}-{size}")
    ranges = ShapeRanges(Range.fixed(1), side, side, Range.fixed(77))
    return prepare(model, plan_for_model(slot, SLOTS[slot]), folder, ranges=ranges).bundle


# Overhead


def bare_call(session: Any, feeds: Mapping[str, Any], outputs: Mapping[str, Any]) -> Callable[[], object]:
    """What the target's library itself does for these tensors, everything bound now; they must outlive the call."""
    from engines.sessions.onnxruntime_session import ELEMENT

    if hasattr(session, "_request"):
        for name, tensor in {**feeds, **outputs}.items():
            session._request.set_tensor(name, session._shared(tensor))
        found: Callable[[], object] = session._request.infer
        return found
    binding = session._session.io_binding()
    for tensors, bind in ((feeds, binding.bind_input), (outputs, binding.bind_output)):
        for name, tensor in tensors.items():
            bind(name, "cpu", 0, ELEMENT[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
    return partial(session._session.run_with_iobinding, binding)


class Steps:
    """Stands for a pipeline's UNet: runs it, and the library's bare call on the same tensors before or after."""

    def __init__(self, unet: Any) -> None:
        self.unet, self.forward = unet, unet.forward
        self.samples: dict[str, list[float]] = {"bare": [], "runtime": [], "loop": []}
        self.turn = 0
        self.ended = 0.0  # when the last step's calls were done; 0 at the beginning of an image
        vars(unet)["forward"] = self  # an engine module refuses a patched forward pass by its name

    def __call__(self, sample: Any, timestep: Any, encoder_hidden_states: Any, **options: Any) -> Any:
        """Run the UNet as the pipeline asks; what it answers is the runtime's own answer."""
        import torch

        from engines.modules.base import cast_feeds

        started, session = time.perf_counter(), self.unet.session
        tensors = {
            "sample": sample,
            "timestep": torch.tensor(float(timestep)),
            "encoder_hidden_states": encoder_hidden_states,
        }
        feeds = {name: tensor.contiguous() for name, tensor in cast_feeds(session, tensors).items()}
        outputs = {"out_sample": torch.empty_like(feeds["sample"])}
        calls = {"runtime": partial(self.forward, sample, timestep, encoder_hidden_states, **options), "bare": None}
        spent, results = {}, {}
        for name in sorted(calls, reverse=bool(self.turn % 2)):
            # Bound anew each time: the runtime's own call leaves the library with memory that is free by now.
            call = calls[name] or bare_call(session, feeds, outputs)
            start = time.perf_counter()
            results[name] = call()
            spent[name] = time.perf_counter() - start
        if self.ended:  # the first step of an image follows on the text encoder
            for name, seconds in {**spent, "loop": started - self.ended}.items():
                self.samples[name].append(seconds)
        self.turn += 1
        self.ended = time.perf_counter()
        return results["runtime"]


def measure_overhead(bundle: Path, slot: str, images: int, call: Mapping[str, Any]) -> dict[str, list[float]]:
    """Seconds of each denoising step's bare call, EngineUNet, and the rest: guidance, scheduler, diffusers' loop."""
    from engines import load_pipeline

    pipe: Any = load_pipeline(bundle, slot)
    pipe.set_progress_bar_config(disable=True)
    pipe("warm up", output_type="latent", **{**call, "num_inference_steps": 1})
    steps = Steps(pipe.unet)
    for _ in range(images):
        steps.ended = 0.0
        pipe("a lighthouse in a storm", output_type="latent", **call)
    pipe.unet.close()
    return steps.samples


def overhead_row(model: str, slot: str, samples: Mapping[str, list[float]]) -> dict[str, Any]:
    """Medians; the runtime's overhead and the whole step's as medians of pairs' differences, with 95 % intervals."""
    bare = statistics.median(samples["bare"])
    runtime = [r - b for r, b in zip(samples["runtime"], samples["bare"], strict=True)]
    whole = [own + loop for own, loop in zip(runtime, samples["loop"], strict=True)]
    return {
        "model": model, "slot": slot, "bare_seconds": bare,
        "runtime_seconds": statistics.median(samples["runtime"]), "loop_seconds": statistics.median(samples["loop"]),
        "overhead_seconds": interval(runtime), "step_overhead_seconds": interval(whole),
        "overhead_share": [value / bare for value in interval(runtime)],
        "step_overhead_share": [value / bare for value in interval(whole)], "samples": dict(samples),
    }  # fmt: skip


def interval(values: Sequence[float]) -> list[float]:
    """Median and its 95 % interval from the binomial's order statistics (normal approximation)."""
    ordered, reach = sorted(values), 0.98 * len(values) ** 0.5
    low, high = max(0, int(len(ordered) / 2 - reach)), min(len(ordered) - 1, int(len(ordered) / 2 + reach))
    return [statistics.median(ordered), ordered[low], ordered[high]]


def overhead(record: Record, rounds: int, work: str, steps: int, size: int, student: str, **_: Any) -> None:
    """The demo model, whose steps are so short that overhead shows, and the student."""
    own = {"num_inference_steps": 2 * steps, "height": size, "width": size}
    for model, images, call in (("demo", DEMO_IMAGES, DEMO), (student, rounds, own)):
        for slot in slots():
            samples = measure_overhead(bundle_of(work, model, slot, call["height"]), slot, images, call)
            record.row(**overhead_row(model, slot, samples))


# Whole images


def images(
    record: Record, piece: str, rounds: int, work: str, steps: int, size: int, teacher: str, student: str
) -> None:
    """Images in turn: medians, and speed over the first variant by paired rounds.

    `peer`: the same ONNX files by Optimum and by us, each with its own settings of ONNX Runtime. `teacher`: from the
    eager teacher to the student's engines, the fastest of OpenVINO's and ONNX Runtime's. A slot: the student on it.
    """
    ours = Path(sys.executable)
    of_piece = {"peer": ["onnxruntime"], "teacher": ["onnxruntime", slots()[-1]]}.get(piece, [piece])
    built = {slot: str(bundle_of(work, student, slot, size)) for slot in of_piece}
    engines = {f"student, {slot}": Variant(ours, "engine", path, slot) for slot, path in built.items()}
    if piece == "peer":
        (engine,) = engines.values()
        optimum = Variant(interop_python(), "optimum", engine.model, "")
        chosen = {"Optimum (same ONNX)": optimum, "onnxruntime": engine}
    else:
        base, model = ("teacher", teacher) if piece == "teacher" else ("student", student)
        chosen = {f"{base}, eager fp32": Variant(ours, "eager", model, "float32"), **engines}
    call = {"num_inference_steps": steps, "height": size, "width": size}
    found, likeness = take_turns(chosen, rounds, call)
    first, *_ = found.values()
    for name, drawn in found.items():
        record.row(**image_row(name, drawn, first, None if piece == "teacher" else likeness[name]))


def image_row(
    name: str, drawn: list[dict[str, Any]], base: list[dict[str, Any]], likeness: float | None
) -> dict[str, Any]:
    """Medians of one variant; how many times faster than `base` a UNet call and a whole image are."""
    outside = [(one["seconds"] - sum(map(sum, (one["unet"], one["vae"], one["text"])))) / len(one["unet"])
               for one in drawn]  # fmt: skip
    pairs = (base, drawn) if drawn is not base else ([], [])
    return {
        "way": name,
        "seconds": statistics.median(one["seconds"] for one in drawn),
        "unet_step_seconds": statistics.median(each for one in drawn for each in one["unet"]),
        "outside_per_step_seconds": statistics.median(outside),
        "image_faster": faster(*([[one["seconds"]] for one in side] for side in pairs)),
        "unet_faster": faster(*([one["unet"] for one in side] for side in pairs)),
        "psnr_db": likeness,
        "samples": drawn,
    }


# The result


def merged(
    before: Mapping[str, Any], new: Mapping[str, Any], piece: str, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A result with one more piece; pieces measured with other settings go."""
    same = before.get("schema") == SCHEMA and before.get("settings") == new["settings"]
    kept = dict(before) if same else {}
    run = {name: new[name] for name in ("date", "commit", "command")}
    optimum = new["optimum"] or kept.get("optimum")
    return {**kept, **new, "optimum": optimum, "runs": {**kept.get("runs", {}), piece: run}, piece: rows}


def page(found: Mapping[str, Any]) -> list[str]:
    """The tables for people."""
    lines = ["# The runtime", "", f"Measured on {found['machine']}, {found['date']}, commit {found['commit']}."]
    shown = {"overhead": overhead_lines, "attention": attention_lines}
    for name in [name for name in PIECES if name in found]:
        lines += ["", *shown.get(name, partial(image_lines, name))(found[name], found)]
        run = found["runs"].get(name, {})
        if run and (run["commit"], run["date"]) != (found["commit"], found["date"]):
            lines += ["", f"Of {run['date']}, commit {run['commit']}."]
    return lines


def overhead_lines(rows: Sequence[Mapping[str, Any]], _: Mapping[str, Any]) -> list[str]:
    """Of denoising steps."""
    cells = [
        [row["model"], row["slot"], f"{row['bare_seconds'] * 1e3:,.2f}", f"{row['runtime_seconds'] * 1e3:,.2f}",
         "{:.3f} ({:.3f} to {:.3f})".format(*(value * 1e3 for value in row["overhead_seconds"])),
         f"{row['overhead_share'][0]:.2%}", f"{row['loop_seconds'] * 1e3:.2f}",
         f"{row['step_overhead_share'][0]:.2%}"]
        for row in rows
    ]  # fmt: skip
    heads = ("model", "target", "bare, ms", "EngineUNet, ms", "overhead, ms (95 %)", "share", "loop, ms",
             "whole step's share")  # fmt: skip
    return [
        "## Denoising steps in a pipeline, with guidance: the library's bare call on the same tensors, and the rest",
        "",
        *table(heads, cells),
        "",
        "Overhead: median of the differences of pairs. Loop: guidance, scheduler and diffusers' own Python between two",
        "UNet calls. Share: of the bare call; the whole step's adds the loop.",
    ]


def image_lines(piece: str, rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> list[str]:
    """Of whole images."""
    cells = [
        [row["way"], f"{row['seconds']:.2f}", f"{row['unet_step_seconds'] * 1e3:,.0f}",
         f"{row['outside_per_step_seconds'] * 1e3:.1f}", ratio_cell(row["unet_faster"]),
         ratio_cell(row["image_faster"]), NONE if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"]
        for row in rows
    ]  # fmt: skip
    settings = found["settings"]
    return [
        f"## Whole images, {piece}: {settings['steps']} steps, {settings['size']} px, guidance 7.5",
        "",
        *table(
            ("way", "image, s", "UNet call, ms", "outside, ms per step", "UNet call", "image", "PSNR, dB"), cells, 1
        ),
        "",
        f"Times faster than {rows[0]['way']}: ratios of medians with a 95 % bootstrap interval over paired rounds.",
        "PSNR: of the image, to the first way's. Outside: what is neither UNet, VAE nor text encoder.",
    ]


def attention_lines(rows: Sequence[Mapping[str, Any]], _: Mapping[str, Any]) -> list[str]:
    """Of forms of attention, in a result that is there: the trial is in the history, at the commit that it names."""
    cells = [
        [f"{row['queries']} x {row['keys']} x {row['width']}", row["form"], f"{row['seconds'] * 1e3:,.1f}",
         ratio_cell(row["faster"])]
        for row in rows
    ]  # fmt: skip
    heads = ("queries x keys x width", "form", "ms", "faster than opset 23's")
    return ["## Attention in ONNX Runtime: batch 2, 8 heads, float32", "", *table(heads, cells)]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = [piece for piece in PIECES if piece != "attention" and (piece not in SLOTS or piece in slots())]
    parser.add_argument("--pieces", default=",".join(here), help=f"of {','.join(here)}; all by default")
    parser.add_argument("--rounds", type=int, default=3, help="images of each way")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", type=int, default=512, help="pixels")
    parser.add_argument("--teacher", default="random:sd15")
    parser.add_argument("--student", default="random:sd15-tiny")
    parser.add_argument("--work", type=Path, default=ROOT / "artifacts" / "bench-runtime", help="bundles; re-used")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks")
    asked = parser.parse_args()
    if unknown := set(asked.pieces.split(",")) - set(here):
        parser.error(f"piece {min(unknown)!r} is unknown or cannot run here: choose of {', '.join(here)}")
    return asked


def main() -> None:
    """Measure and write, piece by piece: what is done stays when the rest is interrupted."""
    asked = parse()
    settings = {name: getattr(asked, name) for name in SETTINGS}
    options = " ".join(f"--{name} {value}" for name, value in {"rounds": asked.rounds, **settings}.items())
    command = f"python tools/bench_runtime.py --pieces {asked.pieces} {options}"
    file, place = asked.output / machine() / "runtime.json", Place(asked.work, python_path(), logged=False)
    for name in asked.pieces.split(","):
        given = {"rounds": asked.rounds, "work": str(asked.work), **settings}
        piece = Piece(name, "bench_runtime:images", {"piece": name, **given})
        if name == "overhead":
            piece = Piece(name, "bench_runtime:overhead", given)
        rows = run_or_exit(piece, place)["rows"]
        optimum = optimum_versions(interop_python()) if name == "peer" else None
        new = {**head(command, settings=settings, optimum=optimum), "schema": SCHEMA}
        found = merged(read_json(file) if file.is_file() else {}, new, name, rows)
        keep(file, found, page(found))


if __name__ == "__main__":
    main()
