"""Order statistics and the ratio of two medians with a bootstrap confidence interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rounds = Sequence[Sequence[float]]
"""Samples as they were taken: one inner sequence per round of an interleaved measurement."""

CONFIDENCE = 0.95
RESAMPLES = 2000
FEWEST_ROUNDS = 3  # fewer say nothing about drift
FEWEST_FOR_P99 = 100  # below, the 99th percentile is the slowest call


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of all samples, and the samples themselves, round by round."""

    median: float
    p10: float
    p90: float
    samples: tuple[tuple[float, ...], ...]

    @staticmethod
    def of(rounds: Rounds, scale: float = 1.0) -> Spread:
        """Summarise rounds of samples, each multiplied by `scale` (1000 turns seconds into ms)."""
        kept = tuple(tuple(float(value) * scale for value in part) for part in rounds)
        values = np.concatenate([np.asarray(part, dtype=np.float64) for part in kept])
        p10, median, p90 = (float(value) for value in np.percentile(values, (10, 50, 90)))
        return Spread(median, p10, p90, kept)

    @property
    def count(self) -> int:
        """Number of samples."""
        return sum(len(part) for part in self.samples)

    @property
    def p99(self) -> float | None:
        """99th percentile of all samples; None for fewer than 100."""
        if self.count < FEWEST_FOR_P99:
            return None
        return float(np.percentile([value for part in self.samples for value in part], 99))

    @property
    def relative_width(self) -> float:
        """(p90 - p10) / median: 0 for a silent machine."""
        return (self.p90 - self.p10) / self.median if self.median else 0.0


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians and its confidence interval."""

    value: float
    low: float
    high: float
    confidence: float = CONFIDENCE

    @property
    def tie(self) -> bool:
        """Whether the interval holds 1.0: no difference was shown."""
        return self.low <= 1.0 <= self.high


@dataclass(frozen=True)
class Gain:
    """A ratio of medians, and its interval where enough rounds were timed."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def tie(self) -> bool:
        """Whether an interval holds 1.0."""
        return self.low is not None and self.high is not None and self.low <= 1.0 <= self.high


def gain(baseline: Rounds, subject: Rounds) -> Gain:
    """As `speedup`; without an interval where there are too few rounds for one."""
    if found := speedup(baseline, subject):
        return Gain(found.value, found.low, found.high)
    return Gain(Spread.of(baseline).median / Spread.of(subject).median)


def speedup(baseline: Rounds, subject: Rounds, *, paired: bool = True) -> Ratio | None:
    """How many times faster `subject` is than `baseline`: median(baseline) / median(subject), with its interval.

    Two-stage percentile bootstrap (Davison & Hinkley 1997, section 3.8): rounds are drawn with replacement, the
    same rounds for both sides when they were interleaved (`paired`, and equal numbers of rounds), so that drift of
    the machine cancels; then samples within each round. None with fewer than three rounds on either side.
    """
    if min(len(baseline), len(subject)) < FEWEST_ROUNDS:
        return None
    generator = np.random.default_rng(0)

    def draw(rounds: Rounds) -> NDArray[np.int64]:
        return generator.integers(0, len(rounds), size=(RESAMPLES, len(rounds)))

    first = draw(baseline)
    second = first if paired and len(subject) == len(baseline) else draw(subject)
    ratios = _medians(baseline, first, generator) / _medians(subject, second, generator)
    tail = 50 * (1 - CONFIDENCE)
    low, high = (float(value) for value in np.percentile(ratios, (tail, 100 - tail)))
    return Ratio(Spread.of(baseline).median / Spread.of(subject).median, low, high)


def _medians(rounds: Rounds, drawn: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.float64]:
    """Median of each resample: [resamples] from rounds of any length and drawn round numbers [resamples, rounds]."""
    lengths = np.array([len(part) for part in rounds])
    table = np.full((len(rounds), int(lengths.max())), np.nan)  # ragged rounds are padded with NaN
    for row, part in zip(table, rounds, strict=True):
        row[: len(part)] = part
    width = lengths[drawn][:, :, None]  # [resamples, rounds, 1]
    columns = (generator.random((*drawn.shape, table.shape[1])) * width).astype(np.int64)
    values = table[drawn[:, :, None], columns]  # [resamples, rounds, longest]
    values[np.arange(table.shape[1]) >= width] = np.nan  # a short round weighs less
    result: NDArray[np.float64] = np.nanmedian(values.reshape(len(drawn), -1), axis=1)
    return result
