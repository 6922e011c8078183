"""Timing: one clock for every kind of device, warm-up until stable, and rounds interleaved over the cases."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sdkd.console import Progress, quiet

Work = Callable[[], object]
Enter = Callable[[], Work]
"""Makes a case ready (opens its model if need be) and gives what is timed."""

BURST = 3  # timed calls in a row, after one that is thrown away: caches and threads belong to the case again
FEWEST_ROUNDS = 3
LONGEST_BURST = 50
WARM_CALLS = 3  # as many calls in a row must agree
WARM_TOLERANCE = 0.10
MOST_WARM_CALLS = 12


@dataclass(frozen=True)
class Sample:
    """One timed call, in seconds: wall clock, CPU time of all threads, and the device's own time on CUDA."""

    wall_s: float
    cpu_s: float
    device_s: float | None = None

    @property
    def seconds(self) -> float:
        """The device's time where it has a clock of its own, the wall clock elsewhere."""
        return self.wall_s if self.device_s is None else self.device_s


class Timer:
    """The one place that knows how a device is timed: wall clock and CPU time; on CUDA also a pair of events."""

    def __init__(
        self,
        device: str = "cpu",
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.process_time,
    ) -> None:
        self.device, self.clock, self.cpu_clock = device, clock, cpu_clock

    @property
    def method(self) -> str:
        """How it times, for the report."""
        return "CUDA events" if self.device.startswith("cuda") else "wall clock"

    def time(self, work: Work) -> Sample:
        """Run once and time it; on CUDA all earlier work is finished first, and this work before the clock stops."""
        if self.device.startswith("cuda"):
            return self._time_cuda(work)
        cpu, wall = self.cpu_clock(), self.clock()
        work()
        return Sample(self.clock() - wall, self.cpu_clock() - cpu)

    def _time_cuda(self, work: Work) -> Sample:
        import torch

        torch.cuda.synchronize(self.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cpu, wall = self.cpu_clock(), self.clock()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(self.device)
        return Sample(self.clock() - wall, self.cpu_clock() - cpu, start.elapsed_time(end) / 1000)


def warm_up(work: Work, timer: Timer, most: int = MOST_WARM_CALLS) -> list[float]:
    """Call until three calls in a row lie within 10 % of each other, `most` times at most; seconds of each call."""
    spent: list[float] = []
    while len(spent) < most:
        spent.append(timer.time(work).seconds)
        last = spent[-WARM_CALLS:]
        if len(last) == WARM_CALLS and max(last) <= min(last) * (1 + WARM_TOLERANCE):
            break
    return spent


def rounds_for(runs: int) -> int:
    """Number of rounds that spread `runs` calls in bursts."""
    return max(FEWEST_ROUNDS, math.ceil(runs / BURST))


def burst_length(runs: int, rounds: int, min_seconds: float, call_s: float) -> int:
    """Calls of one case in one round: enough for `runs` calls and for `min_seconds` over all rounds, within reason."""
    for_time = math.ceil(min_seconds / rounds / call_s) if call_s > 0 else LONGEST_BURST
    return max(math.ceil(runs / rounds), min(for_time, LONGEST_BURST))


def interleave(
    cases: Mapping[str, Enter],
    timers: Mapping[str, Timer],
    *,
    runs: int,
    min_seconds: float,
    rounds: int | None = None,
    seed: int = 0,
    progress: Progress = quiet,
) -> dict[str, list[list[Sample]]]:
    """Time all cases in rounds, each round in a new (seeded) order, so that drift of the machine hits all alike.

    Per case: warm-up until stable, then in every round one call that is thrown away and a burst of timed calls; at
    least `runs` calls, and `min_seconds` where the burst limit allows. Gives samples per case and round.
    """
    rounds = rounds or rounds_for(runs)
    order, shuffle = list(cases), random.Random(seed)  # noqa: S311 (an order, not a secret)
    bursts: dict[str, int] = {}
    for name in order:
        progress("warming up", 0.0)
        call_s = warm_up(cases[name](), timers[name])[-1]
        bursts[name] = burst_length(runs, rounds, min_seconds, call_s)
    samples: dict[str, list[list[Sample]]] = {name: [] for name in cases}
    for number in range(rounds):
        shuffle.shuffle(order)
        for place, name in enumerate(order):
            progress("timing UNet steps", (number + place / len(order)) / rounds)
            work = cases[name]()
            work()
            samples[name].append([timers[name].time(work) for _ in range(bursts[name])])
    progress("timed", 1.0)
    return samples
