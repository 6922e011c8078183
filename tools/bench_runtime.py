"""The runtime against what runs inside it, against eager PyTorch, and against Optimum's pipeline: paired, samples kept.

    python tools/bench_runtime.py                                         # everything that this machine can run
    python tools/bench_runtime.py --pieces overhead,onnxruntime           # some pieces; the others' results stay

overhead        denoising steps inside a pipeline; in each, the library's bare call on the same tensors before or after
onnxruntime     whole images of the student: eager fp32 and this engine in turn; the same for openvino, openvino-bf16
peer            whole images: our onnxruntime engines and Optimum's ORTStableDiffusionPipeline on the same ONNX files
teacher         whole images: the eager teacher and the student's engines
attention       forms of attention in ONNX Runtime: see tools/bench_attention.py

Ways of a piece take turns, each in a process of its own that stays loaded. By default models have the shapes of Stable
Diffusion 1.5 and random weights. Writes benchmarks/<machine>/runtime.json and .md. Run it on a quiet machine; with two
cores and 24 GB one piece at a time fits.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench import ROOT, commit, machine
from bench_attention import measure_attention
from bench_export import check_private, interop_python, optimum_versions
from runtime_tables import PIECES, SLOTS, markdown
from runtime_ways import Way, take_turns

from sdkd.compare.measure.stats import speedup
from sdkd.core.files import read_json, write_bytes, write_json

SCHEMA = 2
DEMO_SIZE, DEMO_STEPS, DEMO_IMAGES = 64, 30, 10
SETTINGS = ("steps", "size", "teacher", "student")  # results of other settings are not mixed


class Bench:
    """What was asked for, and the bundles that its pieces share."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.call = {"num_inference_steps": asked.steps, "height": asked.size, "width": asked.size}
        self.ours = Path(sys.executable)
        self._interop: Path | None = None

    @property
    def interop(self) -> Path:
        """Python of Optimum's environment."""
        self._interop = self._interop or interop_python()
        return self._interop

    def bundle(self, model: str, slot: str, size: int) -> Path:
        """A model's bundle with the engines of one slot for single images of one size, made where they are missing."""
        from sdkd.core.profiles import Range, ShapeRanges
        from sdkd.targets.plan import plan_for_model
        from sdkd.workflow import prepare

        side, folder = Range.fixed(size), self.asked.work / f"{model.replace(':', '-').replace('/', '-')}-{size}"
        ranges = ShapeRanges(Range.fixed(1), side, side, Range.fixed(77))
        return prepare(model, plan_for_model(slot, SLOTS[slot]), folder, ranges=ranges).bundle

    def engine(self, slot: str) -> Way:
        """The student on a slot's engines."""
        return Way(self.ours, "engine", str(self.bundle(self.asked.student, slot, self.asked.size)), slot)

    def eager(self, model: str, dtype: str = "float32") -> Way:
        """A model in PyTorch."""
        return Way(self.ours, "eager", model, dtype)


def slots() -> list[str]:
    """Slots that this CPU has units for."""
    from sdkd.targets.registry import cpu_precisions

    return [name for name, kind in SLOTS.items() if kind in cpu_precisions() | {"fp32"}]


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
        unet.forward = self

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
        "model": model,
        "slot": slot,
        "bare_seconds": bare,
        "runtime_seconds": statistics.median(samples["runtime"]),
        "loop_seconds": statistics.median(samples["loop"]),
        "overhead_seconds": interval(runtime),
        "step_overhead_seconds": interval(whole),
        "overhead_share": [value / bare for value in interval(runtime)],
        "step_overhead_share": [value / bare for value in interval(whole)],
        "samples": dict(samples),
    }


def interval(values: Sequence[float]) -> list[float]:
    """Median and its 95 % interval from the binomial's order statistics (normal approximation)."""
    ordered, reach = sorted(values), 0.98 * len(values) ** 0.5
    low, high = max(0, int(len(ordered) / 2 - reach)), min(len(ordered) - 1, int(len(ordered) / 2 + reach))
    return [statistics.median(ordered), ordered[low], ordered[high]]


def piece_overhead(bench: Bench) -> list[dict[str, Any]]:
    """The demo model, whose steps are so short that overhead shows, and the student."""
    demo = {"num_inference_steps": DEMO_STEPS, "height": DEMO_SIZE, "width": DEMO_SIZE}
    rows = []
    for model, images, call in (
        ("demo", DEMO_IMAGES, demo),
        (bench.asked.student, bench.asked.rounds, {**bench.call, "num_inference_steps": 2 * bench.asked.steps}),
    ):
        for slot in slots():
            samples = measure_overhead(bench.bundle(model, slot, call["height"]), slot, images, call)
            rows.append(overhead_row(model, slot, samples))
    return rows


# Whole images


def piece_slot(bench: Bench, slot: str) -> list[dict[str, Any]]:
    """The student: eager, and one target's engines."""
    return rows_of(
        bench, {"student, eager fp32": bench.eager(bench.asked.student), f"student, {slot}": bench.engine(slot)}
    )


def piece_peer(bench: Bench) -> list[dict[str, Any]]:
    """The same ONNX files by us and by Optimum, each with its own settings of ONNX Runtime."""
    ours = bench.engine("onnxruntime")
    return rows_of(bench, {"Optimum (same ONNX)": Way(bench.interop, "optimum", ours.model, ""), "onnxruntime": ours})


def piece_teacher(bench: Bench) -> list[dict[str, Any]]:
    """From the eager teacher to the student's engines: the fastest of OpenVINO's, and ONNX Runtime's."""
    chosen = {slot: bench.engine(slot) for slot in ("onnxruntime", slots()[-1])}
    return rows_of(
        bench,
        {"teacher, eager fp32": bench.eager(bench.asked.teacher)}
        | {f"student, {slot}": way for slot, way in chosen.items()},
        quality=False,
    )


def rows_of(bench: Bench, chosen: Mapping[str, Way], quality: bool = True) -> list[dict[str, Any]]:
    """Measure ways in turn: medians, and speed over the first way by paired rounds."""
    found, likeness = take_turns(chosen, bench.asked.rounds, bench.call)
    base, *_ = found
    return [pipeline_row(name, found[name], found[base], likeness[name] if quality else None) for name in found]


def pipeline_row(
    name: str, drawn: list[dict[str, Any]], base: list[dict[str, Any]], likeness: float | None
) -> dict[str, Any]:
    """Medians of one way; how many times faster than `base` a UNet call and a whole image are."""
    first = drawn is base
    outside = [(one["seconds"] - sum(map(sum, _modules(one)))) / len(one["unet"]) for one in drawn]
    return {
        "way": name,
        "seconds": statistics.median(one["seconds"] for one in drawn),
        "unet_step_seconds": statistics.median(each for one in drawn for each in one["unet"]),
        "outside_per_step_seconds": statistics.median(outside),
        "image_faster": None if first else _faster(*([[one["seconds"]] for one in way] for way in (base, drawn))),
        "unet_faster": None if first else _faster(*([one["unet"] for one in way] for way in (base, drawn))),
        "psnr_db": likeness,
        "samples": drawn,
    }


def _modules(one: Mapping[str, Any]) -> list[list[float]]:
    return [one[name] for name in ("unet", "vae", "text")]


def _faster(base: list[list[float]], other: list[list[float]]) -> list[float] | None:
    ratio = speedup(base, other)
    return [ratio.value, ratio.low, ratio.high] if ratio else None


# Running


def measure(bench: Bench, piece: str) -> list[dict[str, Any]]:
    """The rows of one piece."""
    known: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "overhead": partial(piece_overhead, bench),
        "peer": partial(piece_peer, bench),
        "teacher": partial(piece_teacher, bench),
        "attention": measure_attention,
    }
    return known.get(piece, partial(piece_slot, bench, piece))()


def merged(
    before: Mapping[str, Any], head: Mapping[str, Any], piece: str, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """A result with one more piece; pieces measured with other settings go."""
    same = before.get("schema") == SCHEMA and before.get("settings") == head["settings"]
    kept = dict(before) if same else {}
    optimum = head["optimum"] or kept.get("optimum")
    run = {name: head[name] for name in ("date", "commit", "command")}
    return {**kept, **head, "optimum": optimum, "runs": {**kept.get("runs", {}), piece: run}, piece: rows}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", default="", help=f"of {','.join(PIECES)}; all that run here by default")
    parser.add_argument("--rounds", type=int, default=3, help="images of each way")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", type=int, default=512, help="pixels")
    parser.add_argument("--teacher", default="random:sd15")
    parser.add_argument("--student", default="random:sd15-tiny")
    parser.add_argument("--work", type=Path, default=ROOT / "artifacts" / "bench-runtime", help="bundles; re-used")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks")
    asked = parser.parse_args()
    runs_here = [piece for piece in PIECES if piece not in SLOTS or piece in slots()]
    asked.chosen = asked.pieces.split(",") if asked.pieces else runs_here
    if unknown := set(asked.chosen) - set(runs_here):
        parser.error(f"piece {min(unknown)!r} is unknown or cannot run here: choose of {', '.join(runs_here)}")
    return asked


def main() -> None:
    """Measure and write, piece by piece: what is done stays when the rest is interrupted."""
    from sdkd.compare.measure.environment import environment

    asked = parse()
    bench, folder = Bench(asked), asked.output / machine()
    for piece in asked.chosen:
        rows = measure(bench, piece)
        options = " ".join(f"--{name} {getattr(asked, name)}" for name in ("rounds", *SETTINGS))
        head = {
            "schema": SCHEMA,
            "machine": machine(),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "commit": commit(),
            "command": f"python tools/bench_runtime.py --pieces {','.join(asked.chosen)} {options}",
            "settings": {name: getattr(asked, name) for name in SETTINGS},
            "environment": environment("cpu"),
            "optimum": optimum_versions(bench.interop) if piece == "peer" else None,
        }
        file = folder / "runtime.json"
        found = merged(read_json(file) if file.is_file() else {}, head, piece, rows)
        check_private(found)
        write_json(file, found)
        write_bytes(folder / "runtime.md", markdown(found).encode())


if __name__ == "__main__":
    main()
