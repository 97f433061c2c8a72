"""The step ledger: which samples made which step and what it came to, chained by hashes (`trainer.observe.chain`)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.data.feed import Feed, StepBatch
from trainer.loop import StepSeconds
from trainer.observe.chain import linked
from trainer.observe.ledger import JsonLines, cut_back
from trainer.state import SaveReport, StepResult, TrainState, finite


class StepLedger:
    """Writes one line a step. Continues after `step`: what was written for later steps is done again.

    `ranks` is their number, `generators` the state of this rank's random number generators by name.
    """

    def __init__(
        self, path: Path, feed: Feed, step: int, ranks: int, generators: Callable[[], dict[str, Any]] = dict
    ) -> None:
        self._before = cut_back(path, step)
        self._feed = feed
        self._ranks = ranks
        self._generators = generators
        self._lines = JsonLines(path)

    def on_step(self, state: TrainState, batch: StepBatch, result: StepResult, seconds: StepSeconds) -> None:
        """Write the line of this step."""
        entry = {
            "step": state.step,
            "epoch": int(batch.epoch),
            "position": int(batch.position),
            "rows": [int(row) for row in batch.rows],
            "samples": self._feed.samples_of_step(batch),
            "supervised_tokens": result.supervised_tokens,
            "ranks": self._ranks,
            "learning_rate": result.learning_rate,
            "rng": _digest(self._generators()),
            "loss": finite(result.loss),
            "gradient_norm": finite(result.gradient_norm),
        }
        self._before = entry | linked(entry, self._before)
        self._lines.append(self._before)

    def on_evaluate(self, state: TrainState, metrics: dict[str, float]) -> None:
        """Evaluation consumes no training data."""

    def on_save(self, state: TrainState, report: SaveReport) -> None:
        """Make the lines of the committed steps as durable as the checkpoint is."""
        self._lines.sync()

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def _digest(states: dict[str, Any]) -> str:
    total = hashlib.sha256()
    for name, array in sorted(states.items()):
        total.update(name.encode())
        total.update(array.tobytes())
    return total.hexdigest()[:32]
