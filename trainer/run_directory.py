"""Names inside a run directory, and the lock that keeps it to one run at a time."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trainer.durable import make_directory, write_errors
from trainer.errors import RunLockedError
from trainer.run_lock import REMEDY, RunLock, living_holder, take


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
    def times(self) -> Path:
        """When each phase began and each step ended."""
        return self.path / "time.jsonl"

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
    def base_model(self) -> Path:
        """Fingerprint of the base model that a LoRA adapter is trained beside."""
        return self.path / "base-model.json"

    @property
    def model_files(self) -> Path:
        """config.json, generation_config.json, tokenizer, adapter_config.json: copied into every checkpoint."""
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

    @property
    def hang(self) -> Path:
        """The verdict of the watchdogs over a hang."""
        return self.path / "errors" / "hang.json"

    def error_report(self, rank: int) -> Path:
        """The whole traceback of what ended a rank."""
        return self.path / "errors" / f"rank-{rank}.txt"

    def in_use(self) -> bool:
        """Whether a living process holds it."""
        return living_holder(self.path) is not None

    def refuse_second_start(self) -> None:
        """Raise RunLockedError when a living process holds it. Launchers call this: it is known within a second."""
        if (holder := living_holder(self.path)) is not None:
            raise RunLockedError(f"{self.path} is in use by {holder}", REMEDY)

    def forget_last_start(self) -> None:
        """Remove error reports and marker of an earlier start, unless the directory is in use. A launcher calls this.

        An attempt that fails before rank 0 has removed the marker must not look as if it had stopped on request.
        """
        if not self.in_use():
            with write_errors(self.path):
                self.stopped.unlink(missing_ok=True)
                for report in self.error_report(0).parent.glob("rank-*.txt"):
                    report.unlink(missing_ok=True)

    def keep_private(self, *, share_with_group: bool) -> None:
        """Let nobody but this user (and the group, if shared) read what this process writes from now on.

        A directory that is there already gets the modes of a new one, if it is ours to change. Every rank calls this.
        """
        os.umask(0o007 if share_with_group else 0o077)
        with suppress(OSError):
            # Closing the top closes all below it. Setgid: files get the group of the directory, not of their writer.
            self.path.chmod(0o2770 if share_with_group else 0o700)
            for file in self.path.iterdir():
                # What a launcher left before any rank was there.
                if file.is_file() and not file.is_symlink():
                    file.chmod(0o660 if share_with_group else 0o600)

    def lock(self) -> RunLock:
        """Create the directory and take it for this process until the lock is closed or the process ends.

        `keep_private` comes first.

        Raises RunLockedError when another process has it. Rank 0 calls this.
        """
        make_directory(self.path)
        return take(self.path)
