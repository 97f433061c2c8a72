"""Saves of a running training: one at a time, in the background, given up cleanly when they fail.

    begin    all ranks: copy the state to shared memory, which is all that training waits for (the first time, and after
             a failure, also make room together)
    ...      training goes on; each rank's writer process hashes, writes and syncs
    settle   at a step boundary, once every rank's writer has settled: commit is ordered, or the attempt given up
    ...      training goes on; rank 0's writer writes the manifest, renames, removes old checkpoints
    settle   at a step boundary: everybody knows that the checkpoint is committed

Whether all writers have settled travels in the sum that every step computes anyway, so all ranks change state at the
same step and no collective is added to the loop. Without a writer process a save is written on the spot. Torch-free.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from trainer.checkpoint.commit import (
    Exchange,
    Writer,
    abandon,
    attempt_directory,
    commit_checkpoint,
    common_error,
    failure,
    open_attempt,
    require_room,
)
from trainer.checkpoint.contents import SPARE_BYTES, Files, RankContents, write_contents
from trainer.checkpoint.retention import retain
from trainer.checkpoint.verify import Manifest, step_directory
from trainer.checkpoint.writer_process import Snapshot, WriterProcess
from trainer.errors import CannotWriteError, DivergedError, RunLockedError, SteadfastError
from trainer.run_lock import RunLock
from trainer.state import SaveReport

MAX_FAILURES = 3
"""Saves in a row that may be given up before the run stops."""
FAILED = float(1 << 24)
"""More than any number of ranks."""
FENCED = float(1 << 50)
"""More than any number of failures; sums of all of them are exact in float64."""
_POLL_SECONDS = 0.02


class Mirror(Protocol):
    """Where committed checkpoints are copied to; lives on rank 0."""

    def add(self, path: Path) -> None:
        """Have a committed checkpoint copied."""

    def reports(self) -> list[SaveReport]:
        """What became of copies since the last call; does not wait."""

    @property
    def pending(self) -> list[int]:
        """Steps that must not be removed yet."""

    def finish(self) -> list[SaveReport]:
        """Wait for all copies."""

    def close(self) -> None:
        """End it."""


@dataclass
class _InFlight:
    step: int
    describe: Callable[[Files], Manifest]
    began: float
    snapshot: Snapshot | None = None
    """This rank's state, as long as its writer has not been told to write it."""
    blocked: float = 0.0
    waited: float = 0.0
    committing: bool = False
    outcome: dict[str, Any] | None = None
    """This rank's part of the present phase, once it has settled."""
    waiting_since: float | None = None

    def count(self, began: float) -> None:
        """Training stood still for this save from `began` until now; waiting for it is counted from its own begin."""
        if self.waiting_since is None:
            self.blocked += time.monotonic() - began
        else:
            self.waited = time.monotonic() - self.waiting_since


@dataclass
class Saves:
    """Every rank has one and calls its methods in step with the others."""

    checkpoints: Path
    rank: int
    exchange: Exchange
    keep: int
    writer: WriterProcess | None = None
    """Writes in the background; None: saves block."""
    newest: int | None = None
    """Step of the newest checkpoint known to be whole."""
    mirror: Mirror | None = None
    on_phase: Callable[[str], None] = lambda phase: None
    """Called as each phase begins; fault tests stop the process here."""
    lock: RunLock | None = None
    """Rank 0's right to write to the run directory."""
    _failures: int = field(default=0, init=False)
    _needed: int = field(default=0, init=False)
    """Bytes that the checkpoint before took."""
    _in_flight: _InFlight | None = field(default=None, init=False)

    def begin(
        self, step: int, contents: Callable[[], RankContents], describe: Callable[[Files], Manifest]
    ) -> list[SaveReport]:
        """Start saving `step`; waits for the save before, if that is still under way. `describe` serves rank 0.

        Returns what ended meanwhile. Raises, on all ranks: CannotWriteError after MAX_FAILURES saves in a row failed,
        DivergedError when weights or moments are not finite, RunLockedError when the run directory was lost.
        """
        reports = self.wait()
        began = time.monotonic()
        save = _InFlight(step, describe, began)
        self.on_phase("open")
        parts = contents()
        # A save that follows a good one takes the same room and finds nothing to clear away: its writers see to it.
        together = self.writer is None or self._failures > 0 or self._needed == 0
        if together and (problem := self._open(step, parts.disk_bytes)) is not None:
            return [*reports, self._ended(save, problem)]
        self.on_phase("snapshot")
        if self.writer is None:
            return [*reports, self._ended(save, self._write_here(save, parts))]
        try:
            save.snapshot = self.writer.copy(parts)
            self._order(save)
        except (SteadfastError, OSError, MemoryError) as error:
            save.outcome = failure(error)
        save.blocked = time.monotonic() - began
        self._in_flight = save
        return reports

    @property
    def vote(self) -> float:
        """This rank's share of the sum that `settle` gets.

        1 when it has nothing more to do in the present phase, FAILED more when that went wrong; FENCED, save or not,
        when the run directory was lost.
        """
        save = self._in_flight
        if self.lock is not None and self.lock.lost:
            return FENCED
        if save is None:
            return 0.0
        if save.outcome is None and save.snapshot is None and self.writer is not None:
            # While rank 0 commits, the others have nothing to do.
            save.outcome = {} if save.committing and self.rank != 0 else self.writer.reply()
        return 0.0 if save.outcome is None else 1.0 + (FAILED if "fact" in save.outcome else 0.0)

    def settle(self, votes: float, ranks: int) -> list[SaveReport]:
        """Move on when all ranks voted for it; `votes` is the sum over `ranks` ranks. Returns the save if it ended.

        Raises what `begin` raises.
        """
        if votes >= FENCED:
            raise self._fenced()
        began = time.monotonic()
        reports = self.mirror.reports() if self.mirror is not None else []
        save = self._in_flight
        if save is not None and save.snapshot is not None and save.outcome is None:
            self._order(save)
            save.count(began)
            began = time.monotonic()
        if save is None or votes % FAILED < ranks:
            return reports
        # When all went well, a commit has nothing to tell but that.
        outcomes = [] if save.committing and votes < FAILED else self.exchange(save.outcome or {})
        problem = common_error(outcomes)
        attempt = attempt_directory(self.checkpoints, save.step)
        if problem is None and not save.committing:
            self.on_phase("settle")
            save.committing, save.outcome = True, None
            if self.rank == 0 and self.writer is not None:
                files = {name: entry for outcome in outcomes for name, entry in sorted(outcome["files"].items())}
                protected = self.mirror.pending if self.mirror is not None else []
                try:
                    self.writer.commit(
                        attempt,
                        step_directory(self.checkpoints, save.step),
                        save.describe(files),
                        self.keep,
                        protected,
                        self.lock.file if self.lock is not None else None,
                    )
                except SteadfastError as error:
                    save.outcome = failure(error)
            save.count(began)
            return reports
        if problem is not None and self.rank == 0:
            abandon(attempt, problem)
        self._in_flight = None
        save.count(began)
        return [*reports, self._ended(save, problem)]

    def wait(self) -> list[SaveReport]:
        """Wait until nothing is in flight; all ranks call it together. Returns the save that ended, if one was."""
        reports: list[SaveReport] = []
        began = time.monotonic()
        while (save := self._in_flight) is not None:
            votes = self.exchange({"vote": self.vote})
            save.waiting_since = began
            reports += self.settle(sum(entry["vote"] for entry in votes), len(votes))
            if self._in_flight is save:
                if save.snapshot is not None and save.outcome is None:
                    fact = f"no training step followed that would have told the rest of step {save.step}"
                    save.outcome = failure(CannotWriteError(fact))
                if save.outcome is None and self.writer is not None and not (save.committing and self.rank != 0):
                    save.outcome = self.writer.reply(_POLL_SECONDS)
                else:
                    time.sleep(_POLL_SECONDS / 10)
        return reports

    def close(self) -> None:
        """End the processes that write and upload."""
        if self.writer is not None:
            self.writer.close()
        if self.mirror is not None:
            self.mirror.close()

    def _order(self, save: _InFlight) -> None:
        """Have the writer begin, once everything that it is to write is known."""
        if save.snapshot is None or self.writer is None:
            return
        late = save.snapshot.contents.late
        more = late() if late is not None else {}
        if more is None:
            return
        try:
            needed = self._needed if self.rank == 0 else 0
            snapshot = self.writer.add(save.snapshot, more) if more else save.snapshot
            self.writer.write(attempt_directory(self.checkpoints, save.step), snapshot, needed)
        except (SteadfastError, OSError, MemoryError) as error:
            save.outcome = failure(error)
        save.snapshot = None

    def _fenced(self) -> RunLockedError:
        if self.lock is not None:
            try:
                self.lock.check()
            except RunLockedError as error:
                return error
        return RunLockedError(f"{self.checkpoints.parent} was taken over by another run", "that run goes on")

    def _open(self, step: int, size: int) -> SteadfastError | None:
        """Make room and the directory; why there is neither, equal on all ranks, or None."""
        attempt = attempt_directory(self.checkpoints, step)
        needed = self._needed = sum(answer["bytes"] for answer in self.exchange({"bytes": size})) + SPARE_BYTES
        mine: dict[str, Any] = {}
        if self.rank == 0:
            try:
                if self.lock is not None:
                    self.lock.check()
                open_attempt(self.checkpoints, attempt)
                self._make_room()
                require_room(self.checkpoints, needed)
            except (SteadfastError, OSError) as error:
                mine = failure(error)
        problem = common_error(self.exchange(mine))
        if problem is not None and self.rank == 0:
            abandon(attempt, problem)
        return problem

    def _make_room(self) -> None:
        """After a save that failed: if room is short, only what must stay stays.

        After a second failure in any case: a quota is a shortage that the file system does not show.
        """
        short = shutil.disk_usage(self.checkpoints).free < self._needed
        if self.newest is not None and (self._failures > 1 or (self._failures and short)):
            retain(self.checkpoints, 1, self.newest, self.mirror.pending if self.mirror else [])

    def _write_here(self, save: _InFlight, contents: RankContents) -> SteadfastError | None:
        writer = Writer(self.rank, lambda place: write_contents(contents, place), self.exchange, self.on_phase)
        try:
            protected = self.mirror.pending if self.mirror is not None else []
            guard = self.lock.check if self.lock is not None else lambda: None
            commit_checkpoint(self.checkpoints, save.step, writer, save.describe, self.keep, protected, guard)
        except (CannotWriteError, DivergedError, RunLockedError) as error:
            return error
        finally:
            save.blocked = time.monotonic() - save.began
        return None

    def _ended(self, save: _InFlight, error: SteadfastError | None) -> SaveReport:
        target = step_directory(self.checkpoints, save.step)
        if isinstance(error, RunLockedError):
            raise error
        if isinstance(error, DivergedError):
            raise DivergedError(f"{error.fact} at step {save.step}, which is not saved", error.remedy)
        problem = None if error is None else error.fact
        if problem is None:
            self._failures, self.newest = 0, save.step
            if self.mirror is not None:
                self.mirror.add(target)
        else:
            self._failures += 1
            if self.rank == 0:
                sys.stderr.write(f"warning: the save of step {save.step} was given up: {problem}; training goes on\n")
            if self._failures >= MAX_FAILURES:
                raise CannotWriteError(
                    f"{MAX_FAILURES} saves in a row failed, the last one of step {save.step}: {problem}",
                    f"make room in {self.checkpoints}, then start the same command again",
                )
        return SaveReport(
            step=save.step,
            path=str(target),
            outcome="committed" if problem is None else "given up",
            problem=problem,
            blocked_seconds=save.blocked + save.waited,
            waited_seconds=save.waited,
            seconds=time.monotonic() - save.began,
        )
