"""Timing: one clock for every kind of device, warm-up until stable, and rounds interleaved over the cases."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sdkd.core.console import Progress, quiet

Work = Callable[[], object]

BURST = 3  # timed calls in a row, after one thrown away or a warm-up: caches and threads belong to the case again
FEWEST_ROUNDS = 3
LONGEST_BURST = 50
WARM_CALLS = 3  # as many calls in a row must agree
WARM_TOLERANCE = 0.10
MOST_WARM_CALLS = 12
MOST_WARM_SECONDS = 8.0  # after the first call; what takes seconds has little left to warm up then
LONG_CALL_S = 2.0  # a warm call this long is a sample, and caches need no other call before the next one


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

    def over(self, calls: int) -> Sample:
        """The mean of so many calls that were timed together."""
        device_s = None if self.device_s is None else self.device_s / calls
        return self if calls == 1 else Sample(self.wall_s / calls, self.cpu_s / calls, device_s)


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


def warm_up(work: Work, timer: Timer) -> list[Sample]:
    """Call until three calls in a row lie within 10 % of each other; all calls, timed.

    MOST_WARM_CALLS times at most, and for MOST_WARM_SECONDS after the first call, in which something may be compiled.
    """
    spent: list[Sample] = []
    while len(spent) < MOST_WARM_CALLS and sum(one.seconds for one in spent[1:]) < MOST_WARM_SECONDS:
        spent.append(timer.time(work))
        last = [one.seconds for one in spent[-WARM_CALLS:]]
        if len(last) == WARM_CALLS and max(last) <= min(last) * (1 + WARM_TOLERANCE):
            break
    return spent


@dataclass(frozen=True)
class Part:
    """One thing that is timed of every case: at least `runs` calls and `min_seconds` over `rounds` (None: all)."""

    name: str
    runs: int
    min_seconds: float
    rounds: int | None = None

    def is_due(self, number: int, rounds: int) -> bool:
        """Whether it is timed in this round, so that its own rounds are spread over all."""
        own = self.rounds_of(rounds)
        return number * own // rounds != (number - 1) * own // rounds

    def rounds_of(self, rounds: int) -> int:
        """In how many of so many rounds it is timed."""
        return min(self.rounds or rounds, rounds)


class Bench:
    """Pieces of work by name, ready to be timed in this process."""

    def __init__(self, works: dict[str, Work], timer: Timer) -> None:
        self.works, self.timer = works, timer
        self._call_s: dict[str, float] = {}  # of what was warmed up

    def burst(self, part: str, count: int, seconds: float) -> list[Sample]:
        """At least `count` timed calls, and `seconds` of them within reason: as `Burst`."""
        warm: list[Sample] = []
        if part not in self._call_s:
            warm = warm_up(self.works[part], self.timer)[-1:]
            self._call_s[part] = warm[-1].seconds
        elif self._call_s[part] < LONG_CALL_S:
            self.works[part]()
        kept = warm if self._call_s[part] >= LONG_CALL_S else []
        length = burst_length(count, seconds, self._call_s[part])
        return kept + [self.timer.time(self.works[part]) for _ in range(length - len(kept))]


Burst = Callable[[str, int, float], list[Sample]]
"""A burst of one case: of a part's name, calls and seconds. After a warm-up, or a short call that is thrown away."""
Timed = dict[str, list[list[Sample]]]
"""Samples of one case by part and round."""


def rounds_for(runs: int) -> int:
    """Number of rounds that spread `runs` calls in bursts."""
    return max(FEWEST_ROUNDS, math.ceil(runs / BURST))


def burst_length(count: int, seconds: float, call_s: float) -> int:
    """Calls of one case in one round: at least `count`, and enough for `seconds` unless they are LONGEST_BURST."""
    return max(count, min(math.ceil(seconds / call_s), LONGEST_BURST) if call_s > 0 else LONGEST_BURST)


def interleave(
    cases: Mapping[str, Burst],
    parts: Sequence[Part],
    *,
    rounds: int | None = None,
    seed: int = 0,
    lost: Callable[[str, Exception], None] | None = None,
    progress: Progress = quiet,
) -> dict[str, Timed]:
    """Time all cases in rounds, each round in a new (seeded) order, so that drift of the machine hits all alike.

    Per case and part: a burst in every round that is its own; at least `runs` calls over all rounds, and `min_seconds`
    where the burst limit allows. `lost` hears of a case that raises and is left out from there on; without it the
    error ends all.
    """
    rounds = rounds or rounds_for(parts[0].runs)
    order, shuffle = list(cases), random.Random(seed)  # noqa: S311 (an order, not a secret)
    samples: dict[str, Timed] = {name: {part.name: [] for part in parts} for name in cases}
    for number in range(rounds):
        shuffle.shuffle(order)
        due = [part for part in parts if part.is_due(number, rounds)]
        for place, name in enumerate(turn := tuple(order)):
            progress(f"timing {', '.join(part.name for part in due)}", (number + place / len(turn)) / rounds)
            try:
                for part in due:
                    own = part.rounds_of(rounds)
                    count, seconds = math.ceil(part.runs / own), part.min_seconds / own
                    samples[name][part.name].append(cases[name](part.name, count, seconds))
            except Exception as error:
                if lost is None:
                    raise
                lost(name, error)
                order.remove(name)
    progress("timed", 1.0)
    return samples
