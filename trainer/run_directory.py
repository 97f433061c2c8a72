"""Names inside a run directory, and the lock that keeps it to one run at a time."""

from __future__ import annotations

import fcntl
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from trainer.durable import write_errors
from trainer.locks import take_lock


@dataclass(frozen=True)
class RunDirectory:
    """Where everything of a run lies."""

    path: Path

    @property
    def config(self) -> Path:
        """Resolved configuration of the newest start."""
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        """Numbers derived from configuration, ranks and store."""
        return self.path / "plan.json"

    @property
    def events(self) -> Path:
        """Append-only ledger: start, commit, skip, stop, done."""
        return self.path / "events.jsonl"

    @property
    def metrics(self) -> Path:
        """One line per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def step_ledger(self) -> Path:
        """Which samples made which step."""
        return self.path / "steps" / "steps.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Committed checkpoints."""
        return self.path / "checkpoints"

    @property
    def initial_model(self) -> Path:
        """First weights of a model trained from scratch."""
        return self.path / "initial-model"

    @property
    def model_files(self) -> Path:
        """config.json, generation_config.json and tokenizer: copied into every checkpoint."""
        return self.path / "model"

    @property
    def outcome(self) -> Path:
        """How the run ended."""
        return self.path / "outcome.json"

    @property
    def launched(self) -> Path:
        """Where the newest attempt was launched: what `launch status`, `logs` and `stop` need to find it."""
        return self.path / "launched.json"

    @property
    def stopped(self) -> Path:
        """Marker: stopped on request after a committed checkpoint."""
        return self.path / "stopped.json"

    def error_report(self, rank: int) -> Path:
        """The whole traceback of what ended a rank."""
        return self.path / "errors" / f"rank-{rank}.txt"

    def in_use(self) -> bool:
        """Whether another process has the lock right now."""
        try:
            with (self.path / "lock").open() as stream:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            # No such file, or a file system without locks.
            return False
        return False

    def forget_last_start(self) -> None:
        """Remove error reports and marker of an earlier start, unless the directory is in use. A launcher calls this.

        An attempt that fails before rank 0 has removed the marker must not look as if it had stopped on request.
        """
        if not self.in_use():
            with write_errors(self.path):
                self.stopped.unlink(missing_ok=True)
                for report in self.error_report(0).parent.glob("rank-*.txt"):
                    report.unlink(missing_ok=True)

    def lock(self) -> IO[str]:
        """Create the directory and take it for this process until the returned file is closed or the process ends.

        Raises RunLockedError when another process has it. Rank 0 calls this.
        """
        with write_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        return take_lock(self.path / "lock", str(self.path), "wait for it, stop it, or set another run.dir")
