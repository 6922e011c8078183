"""The runtime against what runs inside it, against eager PyTorch, and against Optimum's pipeline: paired, samples kept.

    python tools/bench_runtime.py                                    # everything; about 40 minutes on two CPU cores
    python tools/bench_runtime.py --pieces overhead --rounds 10

overhead   one UNet call through EngineUNet and the library's bare call on the same tensors, one after the other
pipeline   whole images, each way in a process of its own that stays loaded, in rotating order: teacher and student
           eager, the student's engines, and Optimum's ORTStableDiffusionPipeline on the very same ONNX files

By default models have the shapes of Stable Diffusion 1.5 and random weights. Writes benchmarks/<machine>/runtime.json
and .md. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bench import ROOT, commit, machine
from bench_export import check_private, interop_python, optimum_versions

from sdkd.compare.stats import speedup
from sdkd.files import write_bytes, write_json

SLOTS = {"onnxruntime": "fp32", "openvino": "fp32", "openvino-bf16": "bf16"}
WORKER = """
import json, sys, time
kind, model, slot = sys.argv[1:4]
import torch
torch.manual_seed(0)
if kind == "optimum":
    from optimum.onnxruntime import ORTStableDiffusionPipeline
    pipe = ORTStableDiffusionPipeline.from_pretrained(model, provider="CPUExecutionProvider")
elif kind == "engine":
    from engines import load_pipeline
    pipe = load_pipeline(model, slot)
else:
    from sdkd.models import load_eager
    pipe = load_eager(model, getattr(torch, slot))
pipe.set_progress_bar_config(disable=True)
spent = {}
def timed(name, call):
    def run(*arguments, **options):
        start = time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            spent.setdefault(name, []).append(time.perf_counter() - start)
    return run
for name, part, method in (("unet", "unet", "forward"), ("vae", "vae", "decode"), ("text", "text_encoder", "forward")):
    module = getattr(pipe, part)
    setattr(module, method, timed(name, getattr(module, method)))
print("ready", flush=True)
for line in sys.stdin:
    spent.clear()
    start = time.perf_counter()
    pipe("a lighthouse in a storm", generator=torch.Generator().manual_seed(1), output_type="np", **json.loads(line))
    print(json.dumps({"seconds": time.perf_counter() - start, **spent}), flush=True)
"""


class Way:
    """A pipeline in a process of its own, which draws when it is asked to."""

    def __init__(self, python: Path, kind: str, model: str, slot: str) -> None:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [python, "-c", WORKER, kind, model, slot],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
        )  # fmt: skip
        self._read(until="ready")

    def _read(self, until: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # libraries print, too
            if line.startswith(until):
                return line
        raise SystemExit(f"a pipeline's process ended with status {self.process.wait()}: see its message above")

    def draw(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """Seconds of one image, and those of each call of its modules."""
        assert self.process.stdin is not None
        print(json.dumps(call), file=self.process.stdin, flush=True)
        found: dict[str, Any] = json.loads(self._read(until="{"))
        return found

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def bundles(work: Path, student: str, slots: Mapping[str, str]) -> dict[str, Path]:
    """The student's and the demo model's bundles with the engines of every slot, made where they are missing."""
    from sdkd.workflow import prepare

    found = {}
    for name, model in (("student", student), ("demo", "demo")):
        for slot, precision in slots.items():
            made = prepare(model, slot.removesuffix("-bf16"), work / name, precision=precision)
            found[name] = made.bundle
    return found


def bare_call(session: Any, feeds: Mapping[str, Any], outputs: Mapping[str, Any]) -> Callable[[], object]:
    """What the target's library itself does for these tensors, everything bound now; they must outlive the call."""
    from engines.session_onnxruntime import ELEMENT

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


def measure_overhead(bundle: Path, slot: str, pairs: int) -> dict[str, Any]:
    """Seconds of the bare call and of EngineUNet on the same tensors, in turn, the first of each pair changing."""
    import torch

    from engines import load_pipeline
    from engines.module import cast_feeds

    unet: Any = load_pipeline(bundle, slot).unet
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "sample": torch.randn(2, unet.config.in_channels, size, size, generator=generator),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": torch.randn(2, 77, width, generator=generator),
    }
    feeds = {name: tensor.contiguous() for name, tensor in cast_feeds(unet.session, tensors).items()}
    outputs = {name: torch.empty_like(tensor) for name, tensor in unet.session.run(feeds).items()}
    samples: dict[str, list[float]] = {"bare": [], "runtime": []}
    for turn in range(pairs + 1):
        for name in sorted(samples, reverse=bool(turn % 2)):
            # Bound anew each time: the runtime's own call leaves the library with memory that is free by now.
            call = partial(unet, **tensors) if name == "runtime" else bare_call(unet.session, feeds, outputs)
            start = time.perf_counter()
            call()
            if turn:  # the first pair warms up
                samples[name].append(time.perf_counter() - start)
    unet.close()
    return samples


def overhead_row(model: str, slot: str, samples: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and the overhead: the median of the pairs' differences, with a 95 % interval by order statistics."""
    differences = sorted(r - b for r, b in zip(samples["runtime"], samples["bare"], strict=True))
    bare = statistics.median(samples["bare"])
    low, high = _median_interval(differences)
    return {
        "model": model,
        "slot": slot,
        "bare_seconds": bare,
        "runtime_seconds": statistics.median(samples["runtime"]),
        "overhead_seconds": [statistics.median(differences), low, high],
        "overhead_share": [value / bare for value in (statistics.median(differences), low, high)],
        "samples": samples,
    }


def _median_interval(ordered: list[float]) -> tuple[float, float]:
    """95 % interval of a median from the binomial's order statistics (normal approximation)."""
    count = len(ordered)
    reach = 0.98 * count**0.5
    return ordered[max(0, int(count / 2 - reach))], ordered[min(count - 1, int(count / 2 + reach))]


def ways(
    bundle: Path, interop: Path | None, slots: Mapping[str, str], teacher: str, student: str
) -> dict[str, tuple[Path, str, str, str]]:
    """Name -> Python, kind, model and slot or dtype of every way."""
    ours = Path(sys.executable)
    found = {
        "teacher, eager fp32": (ours, "eager", teacher, "float32"),
        "student, eager fp32": (ours, "eager", student, "float32"),
        "student, eager bf16": (ours, "eager", student, "bfloat16"),
        **{f"student, {slot}": (ours, "engine", str(bundle), slot) for slot in slots},
    }
    if "bf16" not in slots.values():
        del found["student, eager bf16"]
    if interop:
        found["student, Optimum (same ONNX)"] = (interop, "optimum", str(bundle), "")
    return found


def measure_pipelines(
    chosen: Mapping[str, tuple[Path, str, str, str]], rounds: int, call: Mapping[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """One image of every way a round, in rotating order, after one that warms up."""
    running = {name: Way(*where) for name, where in chosen.items()}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
    try:
        for turn in range(rounds + 1):
            names = list(running)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                drawn = running[name].draw(call)
                if turn:
                    found[name].append(drawn)
                print(f"round {turn} of {rounds}, {name}: {drawn['seconds']:.2f} s", flush=True)
    finally:
        for way in running.values():
            way.close()
    return found


def pipeline_rows(found: Mapping[str, list[dict[str, Any]]], steps: int) -> list[dict[str, Any]]:
    """Medians of each way; its speed over the teacher, its own eager model and Optimum, by paired rounds."""
    rows = []
    for name, drawn in found.items():
        own = [(one["seconds"] - sum(one["unet"]) - sum(one["vae"]) - sum(one["text"])) / steps for one in drawn]
        rows.append(
            {
                "way": name,
                "seconds": statistics.median(one["seconds"] for one in drawn),
                "unet_step_seconds": statistics.median(each for one in drawn for each in one["unet"]),
                "outside_per_step_seconds": statistics.median(own),
                "faster": {base: _faster(found, base, name) for base in found if base != name},
                "samples": drawn,
            }
        )
    return rows


def _faster(found: Mapping[str, list[dict[str, Any]]], base: str, name: str) -> list[float] | None:
    ratio = speedup([[one["seconds"]] for one in found[base]], [[one["seconds"]] for one in found[name]])
    return [ratio.value, ratio.low, ratio.high] if ratio else None


def markdown(found: Mapping[str, Any]) -> str:
    """The tables for people."""
    lines = ["# The runtime", "", f"Measured on {found['machine']}, {found['date']}, commit {found['commit']}."]
    if rows := found.get("overhead"):
        lines += ["", "## One UNet call, batch 2 (guidance): the runtime against the library's bare call", ""]
        lines += [
            "| model | target | bare, ms | through EngineUNet, ms | overhead, ms (95 %) | share |",
            "|---|---|---:|---:|---:|---:|",
        ]
        lines += [_overhead_line(row) for row in rows]
    if rows := found.get("pipeline"):
        call = found["call"]
        lines += ["", f"## Whole images, {call['num_inference_steps']} steps, {call['height']} px, guidance 7.5", ""]
        lines += ["| way | s | UNet step, ms | outside, ms per step | over teacher | over student | over Optimum |"]
        lines += ["|---|---:|---:|---:|---:|---:|---:|"]
        bases = ("teacher, eager fp32", "student, eager fp32", "student, Optimum (same ONNX)")
        for row in rows:
            cells = " | ".join(_cell(row["faster"].get(base)) for base in bases)
            lines.append(
                f"| {row['way']} | {row['seconds']:.2f} | {row['unet_step_seconds'] * 1e3:,.0f} | "
                f"{row['outside_per_step_seconds'] * 1e3:.1f} | {cells} |"
            )
        lines += [
            "",
            "Speed over the eager teacher, the eager student and Optimum: ratios of medians with a 95 % bootstrap",
            "interval over rounds. Outside: scheduler, guidance and diffusers' own loop.",
        ]
        lines += ["Optimum runs the bundle's ONNX files in its own environment."]
    return "\n".join([*lines, "", "Made again by:", "", f"    {found['command']}", ""])


def _overhead_line(row: Mapping[str, Any]) -> str:
    times = f"{row['bare_seconds'] * 1e3:,.2f} | {row['runtime_seconds'] * 1e3:,.2f}"
    overhead = "{:.3f} ({:.3f} to {:.3f})".format(*(value * 1e3 for value in row["overhead_seconds"]))
    return f"| {row['model']} | {row['slot']} | {times} | {overhead} | {row['overhead_share'][0]:.2%} |"


def _cell(ratio: list[float] | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio[0]:.2f}x ({ratio[1]:.2f} to {ratio[2]:.2f})"


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", default="overhead,pipeline")
    parser.add_argument("--rounds", type=int, default=6, help="images of each way, and pairs of full-size UNet calls")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", type=int, default=512, help="pixels")
    parser.add_argument("--teacher", default="random:sd15")
    parser.add_argument("--student", default="random:sd15-tiny")
    parser.add_argument("--without-optimum", action="store_true")
    parser.add_argument("--without-bf16", action="store_true", help="for a CPU that has no such instructions")
    parser.add_argument("--work", type=Path, default=ROOT / "artifacts" / "bench-runtime", help="bundles; re-used")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks")
    asked = parser.parse_args()
    pieces = asked.pieces.split(",")
    if unknown := set(pieces) - {"overhead", "pipeline"}:
        parser.error(f"piece {min(unknown)!r} is unknown: choose overhead, pipeline")
    from sdkd.compare.environment import environment

    interop = None if asked.without_optimum or "pipeline" not in pieces else interop_python()
    slots = {name: kind for name, kind in SLOTS.items() if not (asked.without_bf16 and kind == "bf16")}
    made = bundles(asked.work, asked.student, slots)
    call = {"num_inference_steps": asked.steps, "height": asked.size, "width": asked.size}
    found: dict[str, Any] = {
        "schema": 1,
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "command": f"python tools/bench_runtime.py --pieces {asked.pieces} --rounds {asked.rounds} "
        f"--steps {asked.steps} --size {asked.size} --teacher {asked.teacher} --student {asked.student}"
        + (" --without-bf16" if asked.without_bf16 else "")
        + (" --without-optimum" if asked.without_optimum else ""),
        "environment": environment("cpu"),
        "optimum": optimum_versions(interop) if interop else None,
        "call": call,
    }
    if "overhead" in pieces:
        found["overhead"] = [
            overhead_row(model, slot, measure_overhead(made[name], slot, pairs))
            for name, model, pairs in (("demo", "demo", 300), ("student", asked.student, asked.rounds * 2))
            for slot in slots
        ]
    if "pipeline" in pieces:
        found["pipeline"] = pipeline_rows(
            measure_pipelines(ways(made["student"], interop, slots, asked.teacher, asked.student), asked.rounds, call),
            asked.steps,
        )
    check_private(found)
    folder = asked.output / machine()
    write_json(folder / "runtime.json", found)
    write_bytes(folder / "runtime.md", markdown(found).encode())


if __name__ == "__main__":
    main()
