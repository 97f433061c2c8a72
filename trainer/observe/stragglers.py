"""Slow ranks, by name: every step takes as long as its slowest rank, so one slow device or disk slows all of them.

What is compared is the time a rank worked on a step, without what it waited for others: with it all ranks look alike.

A rank is named when it was slow in nearly all of the last steps, not in all: the median of one step can be high too (a
save, the garbage collector), and a single such step must not hide a broken device for twenty more. It is named once,
and once more when it has recovered, which takes as many good steps: a rank at the limit is not named again and again.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Sequence
from statistics import fmean, median_low
from typing import Protocol

from trainer.data.feed import StepBatch
from trainer.loop import StepSeconds
from trainer.state import SaveReport, StepResult, TrainState

RATIO = 1.5
"""Times the median from which a step counts as slow."""
STEPS = 20
"""How many of the last steps are looked at."""
ENOUGH = 18
"""Of these, how many slow ones name a rank, and how many good ones clear it."""


class Record(Protocol):
    """Writes an event."""

    def __call__(self, event: str, *, step: int, rank: int, host: str, ratio: float) -> None:
        """Append it to the ledger."""


class Stragglers:
    """Names each rank that takes more than RATIO times the median in ENOUGH of STEPS steps; rank 0 has one.

    On stderr, as an event, and as a text at that step by `show` (TensorBoard).
    """

    def __init__(
        self, hosts: Sequence[str], record: Record, show: Callable[[int, str], None] = lambda step, text: None
    ) -> None:
        self._hosts = hosts
        self._record = record
        self._show = show
        self._ratios: list[deque[float]] = [deque(maxlen=STEPS) for _ in hosts]
        """Of each rank's own time to the median, in the last steps."""
        self._slow_steps = [0] * len(hosts)
        self._named: set[int] = set()

    def on_step(self, state: TrainState, batch: StepBatch, result: StepResult, seconds: StepSeconds) -> None:
        """Count; say who is slow, and who is not any more."""
        if len(result.rank_seconds) < 2:
            return
        middle = max(median_low(result.rank_seconds), 1e-9)
        for rank, own in enumerate(result.rank_seconds):
            ratios = self._ratios[rank]
            if len(ratios) == STEPS:
                self._slow_steps[rank] -= ratios[0] > RATIO
            ratios.append(own / middle)
            self._slow_steps[rank] += ratios[-1] > RATIO
            if len(ratios) < STEPS:
                continue
            if rank not in self._named and self._slow_steps[rank] >= ENOUGH:
                self._named.add(rank)
                self._say(state.step, rank, "straggler", "is slow", "; all ranks wait for it")
            elif rank in self._named and STEPS - self._slow_steps[rank] >= ENOUGH:
                self._named.remove(rank)
                self._say(state.step, rank, "recovered", "is as fast as the others again", "")

    def _say(self, step: int, rank: int, event: str, what: str, more: str) -> None:
        ratio = fmean(self._ratios[rank])
        host = self._hosts[rank]
        text = (
            f"rank {rank} on {host} {what}: its part of a step took {ratio:.1f} times the median of all ranks in the "
            f"{STEPS} steps up to step {step}{more}"
        )
        sys.stderr.write(f"{'warning' if event == 'straggler' else 'note'}: {text}\n")
        self._record(event, step=step, rank=rank, host=host, ratio=round(ratio, 2))
        self._show(step, text)

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
