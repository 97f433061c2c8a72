"""Slow ranks, by name: every step takes as long as its slowest rank, so one slow device or disk slows all of them.

What is compared is the time a rank worked on a step, without what it waited for others: with it all ranks look alike.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from statistics import median_low
from typing import Protocol

from trainer.data.feed import StepBatch
from trainer.loop import StepSeconds
from trainer.state import SaveReport, StepResult, TrainState

RATIO = 1.5
STEPS = 20
"""Steps in a row before a rank is named."""
STEPS_BETWEEN = 1000
"""A rank that stays slow is named again after so many steps."""


class Record(Protocol):
    """Writes an event."""

    def __call__(self, event: str, *, step: int, rank: int, host: str, ratio: float) -> None:
        """Append it to the ledger."""


class Stragglers:
    """Names each rank that needs more than RATIO times the median for STEPS steps in a row; rank 0 has one."""

    def __init__(self, hosts: Sequence[str], record: Record) -> None:
        self._hosts = hosts
        self._record = record
        self._slow = [0] * len(hosts)
        self._excess = [0.0] * len(hosts)

    def on_step(self, state: TrainState, batch: StepBatch, result: StepResult, seconds: StepSeconds) -> None:
        """Count; say who is slow."""
        if len(result.rank_seconds) < 2:
            return
        middle = median_low(result.rank_seconds)
        for rank, own in enumerate(result.rank_seconds):
            if own <= RATIO * middle:
                self._slow[rank], self._excess[rank] = 0, 0.0
                continue
            self._slow[rank] += 1
            self._excess[rank] += own / max(middle, 1e-9)
            if self._slow[rank] % STEPS_BETWEEN == STEPS:
                ratio = self._excess[rank] / self._slow[rank]
                sys.stderr.write(
                    f"warning: rank {rank} on {self._hosts[rank]} is slow: its part of a step took {ratio:.1f} times "
                    f"the median of all ranks for {self._slow[rank]} steps, up to step {state.step}; all ranks wait "
                    "for it\n"
                )
                self._record("straggler", step=state.step, rank=rank, host=self._hosts[rank], ratio=round(ratio, 2))

    def on_evaluate(self, state: TrainState, metrics: dict[str, float]) -> None:
        """Evaluations are not compared."""

    def on_save(self, state: TrainState, report: SaveReport) -> None:
        """Saves are not compared."""

    def close(self) -> None:
        """Nothing is held."""


def pace(rank_seconds: Sequence[float]) -> dict[str, float]:
    """Metrics of one step: the median rank's own time, the slowest rank and its own time; empty for one rank."""
    if len(rank_seconds) < 2:
        return {}
    slowest = max(range(len(rank_seconds)), key=rank_seconds.__getitem__)
    return {
        "ranks/own_ms_median": 1e3 * median_low(rank_seconds),
        "ranks/own_ms_slowest": 1e3 * rank_seconds[slowest],
        "ranks/slowest": float(slowest),
    }
