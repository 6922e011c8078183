"""Timing with a planted clock: warm-up, bursts, interleaved rounds, and a planted slowdown through the whole path."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from sdkd.compare.measure import MOST_WARM_CALLS, Sample, Timer, burst_length, interleave, rounds_for, warm_up
from sdkd.compare.stats import speedup


class Clock:
    """A clock that only work moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: Callable[[int], float]) -> Callable[[], object]:
        """Work whose n-th call takes `seconds(n)`."""
        calls = iter(range(10**6))

        def run() -> object:
            self.now += seconds(next(calls))
            return None

        return run


def timer(clock: Clock) -> Timer:
    return Timer("cpu", clock, lambda: 2 * clock.now)


def test_a_sample_has_wall_and_cpu_time() -> None:
    clock = Clock()
    sample = timer(clock).time(clock.work(lambda _: 0.25))
    assert sample == Sample(0.25, 0.5)
    assert sample.seconds == 0.25
    assert Sample(0.3, 0.1, device_s=0.2).seconds == 0.2
    assert (Timer("cpu").method, Timer("cuda:0").method) == ("wall clock", "CUDA events")


def test_warm_up_ends_when_three_calls_agree() -> None:
    clock = Clock()
    spent = warm_up(clock.work(lambda n: 1.0 / (n + 1) if n < 3 else 0.1), timer(clock))
    assert spent == pytest.approx([1.0, 0.5, 1 / 3, 0.1, 0.1, 0.1])


def test_warm_up_gives_up_on_a_case_that_never_settles() -> None:
    clock = Clock()
    assert len(warm_up(clock.work(lambda n: 1.0 + n % 2), timer(clock))) == MOST_WARM_CALLS


@pytest.mark.parametrize(("runs", "rounds"), [(1, 3), (9, 3), (10, 4), (30, 10)])
def test_runs_are_spread_over_rounds(runs: int, rounds: int) -> None:
    assert rounds_for(runs) == rounds


@pytest.mark.parametrize(
    ("runs", "rounds", "min_seconds", "call_s", "burst"),
    [
        (30, 10, 0.0, 0.1, 3),
        (30, 10, 1.0, 0.01, 10),
        (30, 10, 1.0, 0.0001, 50),
        (30, 10, 1.0, 0.0, 50),
        (1, 3, 0.0, 5.0, 1),
    ],
)
def test_a_burst_lasts_long_enough_within_reason(
    runs: int, rounds: int, min_seconds: float, call_s: float, burst: int
) -> None:
    assert burst_length(runs, rounds, min_seconds, call_s) == burst


def test_rounds_are_interleaved_and_the_first_call_of_a_burst_is_thrown_away() -> None:
    clock, log = Clock(), []

    def case(name: str) -> Callable[[], Callable[[], object]]:
        def work() -> object:
            log.append(name)
            clock.now += 1.0
            return None

        return lambda: work

    names = ["a", "b", "c"]
    samples = interleave(
        {name: case(name) for name in names}, dict.fromkeys(names, timer(clock)), runs=6, min_seconds=0.0, seed=3
    )
    assert {name: [len(part) for part in parts] for name, parts in samples.items()} == {
        name: [2, 2, 2] for name in names
    }
    warm, timed = log[:9], log[9:]
    assert warm == ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    rounds = [timed[start : start + 9] for start in (0, 9, 18)]
    for part in rounds:
        assert sorted(part) == ["a"] * 3 + ["b"] * 3 + ["c"] * 3  # one call thrown away, two timed
        assert part[0:3] == [part[0]] * 3
    assert len({tuple(part) for part in rounds}) > 1  # not always the same order


@pytest.mark.parametrize(("slower", "tie"), [(1.2, False), (1.0, True)])
def test_a_planted_slowdown_is_found_under_drift_and_no_slowdown_is_a_tie(slower: float, tie: bool) -> None:
    clock = Clock()

    def seconds(scale: float, seed: int) -> Callable[[int], float]:
        noise = random.Random(seed)
        return lambda n: 0.1 * scale * (1 + 0.02 * clock.now) * (1 + 0.03 * noise.random())

    cases = {"base": clock.work(seconds(1.0, 0)), "subject": clock.work(seconds(slower, 1))}
    samples = interleave(
        {name: lambda work=work: work for name, work in cases.items()},
        dict.fromkeys(cases, timer(clock)),
        runs=30,
        min_seconds=0.0,
    )
    times = {name: [[sample.seconds for sample in part] for part in parts] for name, parts in samples.items()}
    ratio = speedup(times["base"], times["subject"])
    assert ratio is not None
    assert ratio.tie is tie
    assert ratio.value == pytest.approx(1 / slower, rel=0.03)
