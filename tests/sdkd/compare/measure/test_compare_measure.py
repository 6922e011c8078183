"""Timing with a planted clock: warm-up, bursts, interleaved rounds, and a planted slowdown through the whole path."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from sdkd.compare.measure.stats import speedup
from sdkd.compare.measure.timing import (
    MOST_WARM_CALLS,
    LocalBench,
    Part,
    Sample,
    Timer,
    burst_length,
    interleave,
    rounds_for,
    warm_up,
)


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
    assert len(warm_up(clock.work(lambda n: 0.1 + n % 2), timer(clock))) == MOST_WARM_CALLS


def test_warm_up_of_long_calls_ends_after_a_while_and_not_for_a_compilation() -> None:
    clock = Clock()
    spent = warm_up(clock.work(lambda n: 100.0 if n == 0 else 3.0 + 2 * (n % 2)), timer(clock))
    assert spent == pytest.approx([100.0, 5.0, 3.0])


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


def logged(clock: Clock, log: list[str], name: str) -> Callable[[], object]:
    """Work that takes a second and writes its name."""

    def work() -> object:
        log.append(name)
        clock.now += 1.0
        return None

    return work


def test_rounds_are_interleaved_and_the_first_call_of_a_burst_is_thrown_away() -> None:
    clock, log, names = Clock(), list[str](), ["a", "b", "c"]
    benches = {name: LocalBench({"step": logged(clock, log, name)}, timer(clock)) for name in names}
    samples = interleave(
        {name: lambda bench=bench: bench for name, bench in benches.items()}, [Part("step", 6, 0.0)], seed=3
    )
    assert {name: [len(part) for part in parts["step"]] for name, parts in samples.items()} == {
        name: [2, 2, 2] for name in names
    }
    first, later = log[:15], [log[15:24], log[24:]]
    assert sorted(first) == ["a"] * 5 + ["b"] * 5 + ["c"] * 5  # three to warm up, two timed
    assert [len(set(first[start : start + 5])) for start in (0, 5, 10)] == [1, 1, 1]
    for part in later:
        assert sorted(part) == ["a"] * 3 + ["b"] * 3 + ["c"] * 3  # one call thrown away, two timed
        assert part[0:3] == [part[0]] * 3
    assert len({tuple(dict.fromkeys(part)) for part in (first, *later)}) > 1  # not always the same order


def test_a_part_with_rounds_of_its_own_is_timed_in_so_many_spread_over_all() -> None:
    clock, log = Clock(), list[str]()
    bench = LocalBench({name: logged(clock, log, name) for name in ("step", "vae")}, timer(clock))
    found = interleave({"a": lambda: bench}, [Part("step", 30, 0.0), Part("vae", 6, 0.0, rounds=3)])["a"]
    assert [len(part) for part in found["step"]] == [3] * 10
    assert [len(part) for part in found["vae"]] == [2] * 3
    assert [number for number in range(10) if Part("vae", 6, 0.0, 3).is_due(number, 10)] == [0, 4, 7]
    assert log.count("vae") == (3 + 2) + 2 * (1 + 2)


def test_a_bench_that_was_opened_again_is_warmed_up_before_its_burst() -> None:
    clock, log = Clock(), list[str]()
    samples = interleave(
        {"a": lambda: LocalBench({"step": logged(clock, log, "a")}, timer(clock))}, [Part("step", 6, 0.0)]
    )
    assert [len(part) for part in samples["a"]["step"]] == [2, 2, 2]
    assert len(log) == 3 * (3 + 2)


@pytest.mark.parametrize(("slower", "tie"), [(1.2, False), (1.0, True)])
def test_a_planted_slowdown_is_found_under_drift_and_no_slowdown_is_a_tie(slower: float, tie: bool) -> None:
    clock = Clock()

    def seconds(scale: float, seed: int) -> Callable[[int], float]:
        noise = random.Random(seed)
        return lambda n: 0.1 * scale * (1 + 0.02 * clock.now) * (1 + 0.03 * noise.random())

    cases = {"base": clock.work(seconds(1.0, 0)), "subject": clock.work(seconds(slower, 1))}
    benches = {name: LocalBench({"step": work}, timer(clock)) for name, work in cases.items()}
    samples = interleave({name: lambda bench=bench: bench for name, bench in benches.items()}, [Part("step", 30, 0.0)])
    times = {name: [[sample.seconds for sample in part] for part in parts["step"]] for name, parts in samples.items()}
    ratio = speedup(times["base"], times["subject"])
    assert ratio is not None
    assert ratio.tie is tie
    assert ratio.value == pytest.approx(1 / slower, rel=0.03)
