"""Confidence intervals by bootstrap: rows are drawn again with replacement, and the score is computed each time.

The same draws serve all models, so a difference between two models is that on the same rows: much of what makes single
scores uncertain cancels out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tools.evaluation.metrics import Metric, Sums

ROUNDS = 1000
CONFIDENCE = 0.95
_NUMBERS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Interval:
    """A score and where it lies with 95 % confidence."""

    value: float
    low: float
    high: float


def interval(metric: Metric, seed: int, rounds: int = ROUNDS) -> Interval:
    """The score of `metric` with its percentile interval; the same for the same seed."""
    return _interval(metric.value(), _scores(metric, seed, rounds))


def difference(metric: Metric, base: Metric, seed: int, rounds: int = ROUNDS) -> Interval:
    """How much higher `metric` scores than `base` on the same rows."""
    drawn = _scores(metric, seed, rounds) - _scores(base, seed, rounds)
    return _interval(metric.value() - base.value(), drawn)


def _interval(value: float, drawn: Sums) -> Interval:
    outside = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(drawn, [outside, 1 - outside])
    return Interval(value, float(low), float(high))


def _scores(metric: Metric, seed: int, rounds: int) -> Sums:
    return np.concatenate([metric.score(counts @ metric.parts) for counts in _draws(len(metric.parts), seed, rounds)])


def _draws(rows: int, seed: int, rounds: int) -> Iterator[NDArray[np.float64]]:
    """How often each row was drawn, [some of the rounds, rows]."""
    generator = np.random.default_rng(seed)
    step = max(1, _NUMBERS_AT_ONCE // rows)
    for begin in range(0, rounds, step):
        yield generator.multinomial(rows, [1 / rows] * rows, size=min(step, rounds - begin)).astype(np.float64)
