"""Metrics of a run: one computation, several places to write them (metrics.jsonl, TensorBoard, the terminal)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from trainer.data.feed import StepBatch
from trainer.loop import StepSeconds
from trainer.observe.ledger import JsonLines, cut_back
from trainer.observe.stragglers import pace
from trainer.state import SaveReport, StepResult, TrainState


class Sink(Protocol):
    """A place that takes the metrics of a step."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Take the metrics of one logged step or evaluation."""

    def close(self) -> None:
        """Finish."""


class Metrics:
    """Computes the metrics every `every_steps` steps (and on the first and last) and hands them to the sinks."""

    def __init__(
        self, sinks: Sequence[Sink], *, every_steps: int, max_steps: int, peak_memory_gib: Callable[[], float]
    ) -> None:
        self._sinks = list(sinks)
        self._every_steps = every_steps
        self._max_steps = max_steps
        self._peak_memory_gib = peak_memory_gib
        self._tokens = 0
        self._steps = 0
        self._data_wait = 0.0
        self._since = time.monotonic()
        self._seen_first = False

    def on_step(self, state: TrainState, batch: StepBatch, result: StepResult, seconds: StepSeconds) -> None:
        """Count the step; write when due. Throughput covers all time since the line before, saves included."""
        self._tokens += result.tokens
        self._steps += 1
        self._data_wait += seconds.data_wait
        if self._seen_first and state.step % self._every_steps and state.step != self._max_steps:
            return
        self._seen_first = True
        elapsed = time.monotonic() - self._since
        metrics = {
            "train/loss": result.loss,
            "train/grad_norm": result.gradient_norm,
            "train/learning_rate": result.learning_rate,
            "train/epoch": float(batch.epoch),
            "train/skipped_steps": float(state.skipped_steps),
            "throughput/tokens_per_second": self._tokens / elapsed,
            "throughput/supervised_share": result.supervised_tokens / result.tokens,
            "memory/peak_gib": self._peak_memory_gib(),
            "time/data_wait_ms": 1e3 * self._data_wait / self._steps,
            "time/step_ms": 1e3 * seconds.total,
            **pace(result.rank_seconds),
        }
        self._tokens, self._steps, self._data_wait, self._since = 0, 0, 0.0, time.monotonic()
        self._write(state.step, metrics)

    def on_evaluate(self, state: TrainState, metrics: dict[str, float]) -> None:
        """Write the metrics of an evaluation."""
        self._write(state.step, metrics)

    def on_save(self, state: TrainState, report: SaveReport) -> None:
        """Write how long the save took, and how long training stood still for it."""
        if report.outcome == "committed":
            self._write(
                state.step,
                {
                    "checkpoint/step": float(report.step),
                    "checkpoint/save_seconds": report.seconds,
                    "checkpoint/blocked_seconds": report.blocked_seconds,
                    "checkpoint/waited_seconds": report.waited_seconds,
                },
            )

    def close(self) -> None:
        """Close all sinks."""
        for sink in list(self._sinks):
            self._guarded(sink, sink.close)

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        for sink in list(self._sinks):
            self._guarded(sink, partial(sink.write, step, metrics))

    def _guarded(self, sink: Sink, action: Callable[[], None]) -> None:
        """One place that fails is dropped, the others go on: a broken TensorBoard must not end metrics.jsonl."""
        try:
            action()
        except Exception as error:
            self._sinks.remove(sink)
            sys.stderr.write(f"warning: {type(sink).__name__} failed and is switched off, training goes on: {error}\n")


class MetricsFile:
    """metrics.jsonl: `step` and the metric names as keys."""

    def __init__(self, path: Path, step: int) -> None:
        cut_back(path, step)
        self._lines = JsonLines(path)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line."""
        self._lines.append({"step": step, **metrics})

    def close(self) -> None:
        """Close the file."""
        self._lines.close()
