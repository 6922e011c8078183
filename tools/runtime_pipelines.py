"""Pipelines in processes of their own, for tools/bench_runtime.py: eager, on engines, or Optimum's.

Each stays loaded and draws when it is asked to, so that they can take turns while no two of them work at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_kit.results import ROOT, in_turn

# Runs in Optimum's environment, too: none of our packages but where they are what is measured.
WORKER = """
import json, sys, time
kind, model, slot = sys.argv[1:4]
import numpy, torch
if kind == "optimum":
    from optimum.onnxruntime import ORTStableDiffusionPipeline
    pipe = ORTStableDiffusionPipeline.from_pretrained(model, provider="CPUExecutionProvider")
elif kind == "engine":
    from engines import load_pipeline
    pipe = load_pipeline(model, slot)
else:
    from sdkd.models.resolve import load_eager
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
    vars(module)[method] = timed(name, getattr(module, method))  # engine modules refuse the plain way
print("ready", flush=True)
for line in sys.stdin:
    call = json.loads(line)
    file = call.pop("file")
    spent.clear()
    start = time.perf_counter()
    images = pipe("a lighthouse in a storm", generator=torch.Generator().manual_seed(1), output_type="np", **call)[0]
    seconds = time.perf_counter() - start
    numpy.save(file, numpy.asarray(images[0], dtype="float32"))
    print(json.dumps({"seconds": seconds, **spent}), flush=True)
"""


@dataclass(frozen=True)
class Variant:
    """How to draw: the environment's Python, `eager`, `engine` or `optimum`, the model, and its dtype or slot."""

    python: Path
    kind: str
    model: str
    slot: str


class Running:
    """A variant in its process; a context manager that ends it."""

    def __init__(self, variant: Variant, folder: Path) -> None:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        self.file = Path(tempfile.mkstemp(suffix=".npy", dir=folder)[1])
        self.process = subprocess.Popen(
            [variant.python, "-c", WORKER, variant.kind, variant.model, variant.slot],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
        )  # fmt: skip
        self._read(until="ready")

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self, until: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # libraries print, too
            if line.startswith(until):
                return line
        raise RuntimeError(f"a pipeline's process ended with status {self.process.wait()}: see its message above")

    def draw(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """Seconds of one image, and those of each call of its modules."""
        assert self.process.stdin is not None
        print(json.dumps({**call, "file": str(self.file)}), file=self.process.stdin, flush=True)
        found: dict[str, Any] = json.loads(self._read(until="{"))
        return found

    def image(self) -> np.ndarray:
        """What was drawn last: [height, width, 3] in 0..1."""
        return np.load(self.file).astype(np.float64)


def take_turns(
    chosen: Mapping[str, Variant], rounds: int, call: Mapping[str, Any]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, float | None]]:
    """One image of every variant a round, after a step that warms up; the images' PSNR to the first's, dB.

    None stands for images without any difference, and for the first one's own.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        running = {name: stack.enter_context(Running(one, Path(folder))) for name, one in chosen.items()}
        for one in running.values():
            one.draw({**call, "num_inference_steps": 1})
        for turn, name in in_turn(list(running), rounds):
            found[name].append(running[name].draw(call))
            print(f"round {turn + 1} of {rounds}, {name}: {found[name][-1]['seconds']:.2f} s", flush=True)
        images = {name: one.image() for name, one in running.items()}
    first = next(iter(images.values()))
    errors = {name: float(np.mean((image - first) ** 2)) for name, image in images.items()}
    return found, {name: -10 * float(np.log10(error)) if error else None for name, error in errors.items()}
