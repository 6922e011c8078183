"""Progress of a TensorRT build: nested phases become one fraction, with an estimate where the library is silent."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sdkd.core.console import Progress
from sdkd.targets.tensorrt_api import TensorRT

SMALLEST_STEP = 0.005  # of progress worth reporting
TICK_SECONDS = 1.0
SHOWN_DEPTH = 3  # deeper phases follow each other too fast to be read
# Time is spent very unevenly. Share of each step of a phase, by target; equal where the number of steps is another.
# Measured for tensorrt-rtx on a full-size UNet: nearly all of it in one step that reports nothing.
STEP_WEIGHTS: dict[str, dict[str, tuple[float, ...]]] = {
    "tensorrt-rtx": {"Building engine": (1, 1, 3, 1, 92, 2), "Computing profile costs": (4, 1, 1, 90, 4)},
    "tensorrt": {"Building engine": (1, 1, 3, 1, 92, 2), "Computing profile costs": (90, 4, 2, 2, 2)},
}
# Where a phase lies within its parent's step, when several follow each other there.
SPANS = {"Optimizing graph": (0.0, 0.04), "Computing profile costs": (0.04, 1.0)}
SILENT = "Determining refit engines"


def silent_seconds(weight_bytes: int) -> float:
    """About how long tensorrt-rtx says nothing: 10 to 15 s for 650 MB of weights on two cores."""
    return 2.0 + 0.015 * weight_bytes / 1e6


class PhaseTree:
    """Nested phases with steps -> one fraction that never goes back. Safe to call from several threads."""

    def __init__(self, progress: Progress, target: str, expected: float, clock: Callable[[], float]) -> None:
        self.progress = progress
        self.weights: Mapping[str, tuple[float, ...]] = STEP_WEIGHTS.get(target, {})
        self.expected = expected  # seconds of the silent phase
        self.clock = clock
        self.phases: dict[str, tuple[str | None, int, int, float]] = {}  # parent, steps, steps done, time of the last
        self.fraction = 0.0
        self.reported = ("", -1.0)
        self.lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        with self.lock:
            self.phases[name] = (parent, max(steps, 1), 0, self.clock())
            self._report(name)

    def step(self, name: str, index: int) -> None:
        """Step `index` (from 0) of a phase is done; an unknown phase is ignored."""
        with self.lock:
            if name in self.phases:
                parent, steps, _, _ = self.phases[name]
                self.phases[name] = (parent, steps, min(index + 1, steps), self.clock())
                self._report(name)

    def finish(self, name: str) -> None:
        """A phase ends."""
        with self.lock:
            self.phases.pop(name, None)

    def tick(self) -> None:
        """Time has passed: the silent phase moves on by estimate."""
        with self.lock:
            if SILENT in self.phases:
                self._report(SILENT)

    def _report(self, name: str) -> None:
        chain = [name]
        while (parent := self.phases[chain[0]][0]) in self.phases and parent not in chain:
            chain.insert(0, str(parent))
        self.fraction = max(self.fraction, self._part(chain[0], frozenset()))
        shown = chain[:SHOWN_DEPTH][-1]
        if shown != self.reported[0] or self.fraction - self.reported[1] >= SMALLEST_STEP:
            self.reported = (shown, self.fraction)
            self.progress(shown[:1].lower() + shown[1:], self.fraction)

    def _part(self, name: str, above: frozenset[str]) -> float:
        _, steps, done, _ = self.phases[name]
        weights = self.weights.get(name, ())
        weights = weights if len(weights) == steps else (1.0,) * steps
        inside = self._inside(name, above | {name}) if done < steps else 0.0
        current = weights[done] * inside if done < steps else 0.0
        return (sum(weights[:done]) + current) / sum(weights)

    def _inside(self, name: str, above: frozenset[str]) -> float:
        """How much of a phase's present step is done: by its inner phases, or by the clock."""
        if name == SILENT:
            return 1 - math.exp(-(self.clock() - self.phases[name][3]) / self.expected)
        inner = [child for child, row in self.phases.items() if row[0] == name and child not in above]
        spans = [(SPANS.get(child, (0.0, 1.0)), self._part(child, above)) for child in inner]
        return max((low + (high - low) * part for (low, high), part in spans), default=0.0)


@contextlib.contextmanager
def progress_monitor(trt: TensorRT, progress: Progress, target: str, weight_bytes: int) -> Iterator[object]:
    """An IProgressMonitor that reports phase and fraction; a failure to report (parent gone) cancels the build."""
    tree = PhaseTree(progress, target, silent_seconds(weight_bytes), time.monotonic)
    stop = threading.Event()

    base: Any = trt.IProgressMonitor

    class Monitor(base):
        """Called from the builder's threads, where an exception must not escape."""

        def __init__(self) -> None:
            base.__init__(self)
            self.cancelled = False

        def _safely(self, call: Callable[..., None], *arguments: Any) -> bool:
            try:
                call(*arguments)
            except Exception:  # noqa: BLE001 - the parent is gone: stop building
                self.cancelled = True
            return not self.cancelled

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """TensorRT enters a phase."""
            self._safely(tree.start, phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """TensorRT finished a step; False cancels, also for a failure that another callback noticed."""
            return self._safely(tree.step, phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            """TensorRT leaves a phase."""
            self._safely(tree.finish, phase_name)

        def tick(self) -> None:
            """Until the build is over, once a second."""
            while not stop.wait(TICK_SECONDS) and self._safely(tree.tick):
                pass

    monitor = Monitor()
    ticker = threading.Thread(target=monitor.tick, daemon=True)
    ticker.start()
    try:
        yield monitor
    finally:
        stop.set()
        ticker.join()
