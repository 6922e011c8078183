"""Percentiles, and the ratio of medians on planted data: 20 % slower is called slower, 0 % is a tie."""

from __future__ import annotations

import numpy as np
import pytest

from sdkd.compare.measure.stats import Ratio, Spread, speedup


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


def test_the_99th_percentile_needs_100_samples() -> None:
    assert Spread.of([[1.0] * 99]).p99 is None
    assert Spread.of([[float(n) for n in range(51)], [float(n) for n in range(51, 101)]]).p99 == 99.0


@pytest.mark.parametrize("seed", range(5))
def test_planted_20_percent_is_called_slower(seed: int) -> None:
    ratio = speedup(planted(1.0, seed), planted(1.2, seed + 100))
    assert ratio is not None
    assert not ratio.tie
    assert ratio.high < 1
    assert ratio.value == pytest.approx(1 / 1.2, rel=0.02)


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


def test_equal_seeds_give_equal_intervals() -> None:
    assert speedup(planted(1.0, 0), planted(1.2, 1)) == speedup(planted(1.0, 0), planted(1.2, 1))


def test_rounds_of_different_lengths_are_weighed_by_their_samples() -> None:
    base = [[1.0, 1.0, 1.0, 1.0], [1.0], [1.0]]
    subject = [[2.0], [2.0], [4.0, 4.0, 4.0, 4.0, 4.0]]
    ratio = speedup(base, subject)
    assert ratio is not None
    assert (ratio.value, ratio.low, ratio.high) == (0.25, 0.25, 0.5)


def test_two_rounds_are_too_few_for_an_interval() -> None:
    assert speedup([[1.0], [1.0]], [[2.0], [2.0], [2.0]]) is None


@pytest.mark.parametrize(
    ("low", "high", "tie"), [(0.9, 1.1, True), (1.0, 1.2, True), (1.01, 1.2, False), (0.8, 0.99, False)]
)
def test_a_tie_is_an_interval_that_holds_one(low: float, high: float, tie: bool) -> None:
    assert Ratio((low + high) / 2, low, high).tie is tie
