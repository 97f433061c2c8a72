"""The time ledger, kept by rank 0: when each phase began and each step ended, and what the step waited for.

Lines of time.jsonl: `at` (seconds since the epoch, never going back within a process) and `mark`: a phase that begins
(start, load, train, checkpoint, evaluation, shutdown), `step`, or `gone`. What they mean is `trainer.observe.goodput`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.data.feed import StepBatch
from trainer.loop import StepSeconds
from trainer.observe.clock import process_began
from trainer.observe.goodput import CLASSES, Table, account, advice, timeline
from trainer.observe.ledger import JsonLines, read_lines
from trainer.run_directory import RunDirectory
from trainer.state import SaveReport, StepResult, TrainState

# The phases of the loop (trainer.loop.OnPhase) as classes of time; those of a save all are "checkpoint".
_CLASSES = {
    "start": "start",
    "load": "load",
    "restore": "load",
    "data": "data_wait",
    "agree": "communication_wait",
    "evaluate": "evaluation",
    "save": "checkpoint",
    "end": "shutdown",
}
_IN_TRAINING = {"data_wait", "compute", "communication_wait"}


class TimeLedger:
    """Writes time.jsonl. Call it with (phase, step) as each phase begins; it is also an observer of the run.

    `blocked_seconds` tells how long this process has waited in collectives so far, as far as it can see that. A failing
    ledger must not cost a run: the first error is said on stderr, and nothing is written after it.
    """

    def __init__(self, run: RunDirectory, ranks: int, blocked_seconds: Callable[[], float] = float) -> None:
        self._run = run
        self._blocked_seconds = blocked_seconds
        self._blocked = blocked_seconds()
        # The wall clock may be set while we run; two lines of one process shall not see it.
        self._offset = time.time() - time.monotonic()
        self._lines: JsonLines | None = None
        self._class = "start"
        self._written = "start"
        self._totals = dict.fromkeys(CLASSES, 0.0)
        self._of_step = {"data_wait": 0.0, "communication_wait": 0.0}
        self._before: Table | None = None
        self._steps = self._saves = 0
        self._since = self._now()
        try:
            began = process_began()
            if (newest := _newest(run.times)) is not None and newest > began:
                # This process has trained here before, or the clock was set back.
                began = max(newest, self._now())
            self._lines = JsonLines(run.times)
            self._write(began, "start", process=f"{os.getpid()}-{began:.3f}", ranks=ranks)
        except Exception as error:
            self._give_up(error)

    def __call__(self, phase: str, step: int) -> None:
        """A phase begins; what it is called is said in `trainer.loop`."""
        now = self._now()
        seconds, self._since = now - self._since, now
        self._totals[self._class] += seconds
        if self._class in self._of_step:
            self._of_step[self._class] += seconds
        self._class = _CLASSES.get(phase.partition(":")[0], "compute")
        if phase == "data":
            self._blocked = self._blocked_seconds()
        if phase == "observe":
            self._count_collectives()
            waits = {name: round(waited, 6) for name, waited in self._of_step.items()}
            self._of_step = dict.fromkeys(self._of_step, 0.0)
            self._steps += 1
            self._write(now, "step", step=step, **waits)
            return
        mark = "train" if self._class in _IN_TRAINING else self._class
        if mark != self._written:
            self._written = mark
            self._saves += mark == "checkpoint"
            self._write(now, mark)

    def _count_collectives(self) -> None:
        """Waits in ZeRO's collectives happened while the step computed."""
        inside = self._blocked_seconds() - self._blocked - self._of_step["communication_wait"]
        inside = min(max(0.0, inside), self._totals["compute"])
        self._of_step["communication_wait"] += inside
        self._totals["communication_wait"] += inside
        self._totals["compute"] -= inside

    def begin_training(self, step: int) -> None:
        """The loop begins after `step`, which was restored (0: from the beginning)."""
        self._written = "train"
        self("forward", step)
        self._write(self._since, "train", resumed=step)
        try:
            self._before = account(timeline(self._run))
            self._totals = dict(self._before.seconds)
        except (KeyError, TypeError, ValueError, OSError) as error:
            self._give_up(error)

    def advised_steps(self) -> int | None:
        """Steps between saves that lose least, as far as it can be known by now; None before the first save."""
        if self._before is None:
            return None
        spent = {kind: self._totals[kind] - seconds for kind, seconds in self._before.seconds.items()}
        save = spent["checkpoint"] / self._saves if self._saves else self._before.save_seconds
        step = sum(spent[kind] for kind in _IN_TRAINING) / self._steps if self._steps else self._before.step_seconds
        if save is None:
            return None
        return advice(
            save_seconds=save,
            step_seconds=step,
            restart_seconds=self._before.restart_seconds or 0.0,
            hours=(sum(self._totals.values()) - self._totals["queue"]) / 3600,
            failures=self._before.failures,
        ).steps

    def totals(self) -> dict[str, float]:
        """Metrics of the run so far: share of compute in its wall time, and the seconds of each class."""
        wall = sum(self._totals.values())
        named = {f"goodput/{kind}_seconds": round(seconds, 3) for kind, seconds in self._totals.items() if seconds}
        return {"goodput/share": self._totals["compute"] / wall if wall else 0.0, **named}

    def on_step(self, state: TrainState, batch: StepBatch, result: StepResult, seconds: StepSeconds) -> None:
        """A step is written as its phases pass."""

    def on_evaluate(self, state: TrainState, metrics: dict[str, float]) -> None:
        """An evaluation is written as it begins."""

    def on_save(self, state: TrainState, report: SaveReport) -> None:
        """Make the lines as durable as the checkpoint."""
        if self._lines is not None:
            self._lines.sync()

    def fail(self) -> None:
        """An error ends this process."""
        self._leave(failed=True)

    def close(self) -> None:
        """Write the last line of this process, unless `fail` has done it."""
        self._leave()

    def _leave(self, **details: Any) -> None:
        self._write(self._now(), "gone", **details)
        if self._lines is not None:
            self._lines.close()
        self._lines = None

    def _write(self, at: float, mark: str, **details: Any) -> None:
        if self._lines is None:
            return
        try:
            self._lines.append({"at": round(at, 4), "mark": mark, **details})
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._lines = None
        sys.stderr.write(f"warning: the time ledger failed and is switched off, training goes on: {error}\n")

    def _now(self) -> float:
        return self._offset + time.monotonic()


def _newest(path: Path) -> float | None:
    """Time of the last line of the ledger."""
    newest = None
    for line in read_lines(path):
        newest = float(line["at"])
    return newest
