"""Timing with a planted clock: warm-up, bursts, interleaved rounds; and the ratio of medians with its interval."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from sdkd.compare.measure.stats import Ratio, Spread, speedup
from sdkd.compare.measure.timing import (
    MOST_WARM_CALLS,
    Bench,
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
        self.timer = Timer("cpu", lambda: self.now, lambda: 2 * self.now)

    def work(self, seconds: Callable[[int], float], log: list[str] | None = None, name: str = "") -> Callable[[], None]:
        """Work whose n-th call takes `seconds(n)`, and writes a name."""
        calls = iter(range(10**6))

        def run() -> None:
            self.now += seconds(next(calls))
            if log is not None:
                log.append(name)

        return run


def test_a_sample_has_wall_and_cpu_time() -> None:
    clock = Clock()
    sample = clock.timer.time(clock.work(lambda _: 0.25))
    assert (sample, sample.seconds) == (Sample(0.25, 0.5), 0.25)
    assert Sample(0.3, 0.1, device_s=0.2).seconds == 0.2
    assert (Timer("cpu").method, Timer("cuda:0").method) == ("wall clock", "CUDA events")


@pytest.mark.parametrize(
    ("seconds", "spent"),
    [
        (lambda n: 1.0 / (n + 1) if n < 3 else 0.1, [1.0, 0.5, 1 / 3, 0.1, 0.1, 0.1]),  # three calls agree
        (lambda n: 0.1 + n % 2, [0.1, 1.1] * (MOST_WARM_CALLS // 2)),  # never settles
        (lambda n: 100.0 if n == 0 else 3.0 + 2 * (n % 2), [100.0, 5.0, 3.0]),  # long calls, but for a compilation
    ],
)
def test_warm_up_ends_when_calls_agree_or_after_a_while(seconds: Callable[[int], float], spent: list[float]) -> None:
    clock = Clock()
    assert [one.seconds for one in warm_up(clock.work(seconds), clock.timer)] == pytest.approx(spent)


def test_runs_are_spread_over_rounds_in_bursts_that_last_long_enough_within_reason() -> None:
    assert [rounds_for(runs) for runs in (1, 9, 10, 30)] == [3, 3, 4, 10]
    calls = {(3, 0.0, 0.1): 3, (3, 0.1, 0.01): 10, (3, 0.1, 0.0001): 50, (3, 0.1, 0.0): 50, (1, 0.0, 5.0): 1}
    assert [burst_length(*each) for each in calls] == list(calls.values())


def test_rounds_are_interleaved_and_the_first_call_of_a_burst_is_thrown_away() -> None:
    clock, log, names = Clock(), list[str](), ["a", "b", "c"]
    cases = {name: Bench({"step": clock.work(lambda _: 1.0, log, name)}, clock.timer).burst for name in names}
    samples = interleave(cases, [Part("step", 6, 0.0)], seed=3)
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


def test_long_calls_are_not_made_for_nothing() -> None:
    clock, log = Clock(), list[str]()
    bench = Bench({"step": clock.work(lambda _: 5.0, log, "step")}, clock.timer)
    found = interleave({"a": bench.burst}, [Part("step", 6, 0.0)])["a"]["step"]
    assert [len(part) for part in found] == [2] * 3
    assert len(log) == 3 + 5  # three to warm up, the last of which counts; none is thrown away


def test_a_part_with_rounds_of_its_own_is_timed_in_so_many_spread_over_all() -> None:
    clock, log = Clock(), list[str]()
    bench = Bench({name: clock.work(lambda _: 1.0, log, name) for name in ("step", "vae")}, clock.timer)
    found = interleave({"a": bench.burst}, [Part("step", 30, 0.0), Part("vae", 6, 0.0, rounds=3)])["a"]
    assert [len(part) for part in found["step"]] == [3] * 10
    assert [len(part) for part in found["vae"]] == [2] * 3
    assert [number for number in range(10) if Part("vae", 6, 0.0, 3).is_due(number, 10)] == [0, 4, 7]
    assert log.count("vae") == (3 + 2) + 2 * (1 + 2)


def test_a_case_that_fails_is_left_out_and_the_others_go_on() -> None:
    def fail(part: str, count: int, seconds: float) -> list[Sample]:
        raise ValueError("planted")

    clock, lost = Clock(), list[str]()
    cases = {"a": Bench({"step": clock.work(lambda _: 1.0)}, clock.timer).burst, "b": fail}
    samples = interleave(cases, [Part("step", 6, 0.0)], lost=lambda name, error: lost.append(f"{name}: {error}"))
    assert lost == ["b: planted"]
    assert [len(part) for part in samples["a"]["step"]] == [2, 2, 2]
    with pytest.raises(ValueError, match="planted"):
        interleave(cases, [Part("step", 6, 0.0)])


@pytest.mark.parametrize(("slower", "tie"), [(1.2, False), (1.0, True)])
def test_a_planted_slowdown_is_found_under_drift_and_no_slowdown_is_a_tie(slower: float, tie: bool) -> None:
    clock = Clock()

    def seconds(scale: float, seed: int) -> Callable[[int], float]:
        noise = random.Random(seed)
        return lambda n: 0.1 * scale * (1 + 0.02 * clock.now) * (1 + 0.03 * noise.random())

    works = {"base": clock.work(seconds(1.0, 0)), "subject": clock.work(seconds(slower, 1))}
    cases = {name: Bench({"step": work}, clock.timer).burst for name, work in works.items()}
    samples = interleave(cases, [Part("step", 30, 0.0)])
    times = {name: [[sample.seconds for sample in part] for part in parts["step"]] for name, parts in samples.items()}
    ratio = speedup(times["base"], times["subject"])
    assert ratio is not None
    assert ratio.tie is tie
    assert ratio.value == pytest.approx(1 / slower, rel=0.03)


def planted(slower: float, seed: int, rounds: int = 10, burst: int = 3, drift: float = 0.1) -> list[list[float]]:
    """Samples of 1 s times `slower`, with noise, a slow call in twenty, and a drift that is equal for every seed."""
    generator = np.random.default_rng(seed)
    trend = 1 + drift * np.sin(np.arange(rounds))
    noise = 1 + 0.02 * np.abs(generator.normal(size=(rounds, burst)))
    noise[generator.random((rounds, burst)) < 0.05] *= 1.2
    return [list(map(float, row)) for row in slower * trend[:, None] * noise]


def test_a_spread_keeps_samples_by_round_and_scales_them() -> None:
    spread = Spread.of([[1.0, 2.0], [3.0, 4.0], [5.0]], scale=1000)
    assert (spread.median, spread.p10, spread.p90) == (3000.0, 1400.0, 4600.0)
    assert spread.samples == ((1000.0, 2000.0), (3000.0, 4000.0), (5000.0,))
    assert spread.count == 5
    assert spread.relative_width == pytest.approx(3200 / 3000)
    assert Spread.of([[1.0] * 99]).p99 is None  # 99 calls are too few
    assert Spread.of([[float(n) for n in range(51)], [float(n) for n in range(51, 101)]]).p99 == 99.0


@pytest.mark.parametrize("seed", range(5))
def test_planted_20_percent_is_called_slower(seed: int) -> None:
    ratio = speedup(planted(1.0, seed), planted(1.2, seed + 100))
    assert ratio is not None
    assert not ratio.tie
    assert ratio.high < 1
    assert ratio.value == pytest.approx(1 / 1.2, rel=0.02)
    assert speedup(planted(1.0, seed), planted(1.2, seed + 100)) == ratio  # equal samples give equal intervals


def test_planted_nothing_is_called_a_tie() -> None:
    ratios = [speedup(planted(1.0, seed), planted(1.0, seed + 100)) for seed in range(20)]
    assert sum(ratio is not None and ratio.tie for ratio in ratios) >= 19  # 95 % by construction


def test_drift_common_to_both_cancels_when_rounds_are_paired() -> None:
    base, subject = planted(1.0, 0, drift=0.5), planted(1.1, 1, drift=0.5)
    paired, unpaired = speedup(base, subject), speedup(base, subject[:-1])
    assert paired is not None
    assert unpaired is not None
    assert not paired.tie
    assert paired.high - paired.low < (unpaired.high - unpaired.low) / 3


def test_rounds_of_different_lengths_are_weighed_by_their_samples() -> None:
    base = [[1.0, 1.0, 1.0, 1.0], [1.0], [1.0]]
    subject = [[2.0], [2.0], [4.0, 4.0, 4.0, 4.0, 4.0]]
    ratio = speedup(base, subject)
    assert ratio is not None
    assert (ratio.value, ratio.low, ratio.high) == (0.25, 0.25, 0.5)
    assert speedup([[1.0], [1.0]], [[2.0], [2.0], [2.0]]) is None  # two rounds are too few


@pytest.mark.parametrize(
    ("low", "high", "tie"), [(0.9, 1.1, True), (1.0, 1.2, True), (1.01, 1.2, False), (0.8, 0.99, False)]
)
def test_a_tie_is_an_interval_that_holds_one(low: float, high: float, tie: bool) -> None:
    assert Ratio((low + high) / 2, low, high).tie is tie
