"""The step ledger: which samples made which step, chained by hashes.

The chain makes two runs comparable at a glance: equal chains at a step mean equal data, in equal order, up to it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from trainer.data.feed import Feed, StepBatch
from trainer.loop import StepSeconds
from trainer.observe.ledger import JsonLines, cut_back
from trainer.state import SaveReport, StepResult, TrainState


class StepLedger:
    """Writes one line a step: rows of the plan, the samples in each, and the hash chain. Continues after `step`."""

    def __init__(self, path: Path, feed: Feed, step: int) -> None:
        last = cut_back(path, step)
        self._chain: str = last["chain"] if last else ""
        self._feed = feed
        self._lines = JsonLines(path)

    def on_step(self, state: TrainState, batch: StepBatch, result: StepResult, seconds: StepSeconds) -> None:
        """Write the line of this step."""
        rows = [int(row) for row in batch.rows]
        self._chain = hashlib.sha256(f"{self._chain}|{batch.position}|{rows}".encode()).hexdigest()
        self._lines.append(
            {
                "step": state.step,
                "epoch": int(batch.epoch),
                "position": int(batch.position),
                "rows": rows,
                "samples": self._feed.samples_of_step(batch),
                "supervised_tokens": result.supervised_tokens,
                "chain": self._chain,
            }
        )

    def on_evaluate(self, state: TrainState, metrics: dict[str, float]) -> None:
        """Evaluation consumes no training data."""

    def on_save(self, state: TrainState, report: SaveReport) -> None:
        """Make the lines of the committed steps as durable as the checkpoint is."""
        self._lines.sync()

    def close(self) -> None:
        """Close the file."""
        self._lines.close()
