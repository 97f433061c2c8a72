"""The event ledger: what happened to the run, each line forced to disk."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainer.data.feed import StepBatch
from trainer.loop import StepSeconds
from trainer.observe.ledger import JsonLines
from trainer.redact import redacted
from trainer.state import SaveReport, StepResult, TrainState

EVENT_OF_SAVE = {
    "committed": "commit",
    "given up": "save_failed",
    "uploaded": "upload",
    "not uploaded": "upload_failed",
}


class EventLedger:
    """Writes events.jsonl: takeover, start, resume, skip, straggler, evaluate, commit, stop, done, ..."""

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path, durable=True)

    def record(self, event: str, **details: Any) -> None:
        """Append one event with the present time (UTC)."""
        self._lines.append(
            {"event": event, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **redacted(details)}
        )

    def on_step(self, state: TrainState, batch: StepBatch, result: StepResult, seconds: StepSeconds) -> None:
        """Record a skipped step."""
        if not result.applied:
            rows = [int(row) for row in batch.rows]
            self.record("skip", step=state.step, gradient_norm=result.gradient_norm, loss=result.loss, rows=rows)

    def on_evaluate(self, state: TrainState, metrics: dict[str, float]) -> None:
        """Record the metrics."""
        self.record("evaluate", step=state.step, **metrics)

    def on_save(self, state: TrainState, report: SaveReport) -> None:
        """Record the commit, or why there is none."""
        details: dict[str, Any] = {"checkpoint": Path(report.path).name, "seconds": round(report.seconds, 4)}
        if report.outcome in ("committed", "given up"):
            details["blocked_seconds"] = round(report.blocked_seconds, 4)
            details["waited_seconds"] = round(report.waited_seconds, 4)
        if report.problem is not None:
            details["problem"] = report.problem
        self.record(EVENT_OF_SAVE[report.outcome], step=report.step, **details)

    def close(self) -> None:
        """Close the file."""
        self._lines.close()
