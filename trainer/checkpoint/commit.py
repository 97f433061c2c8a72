"""The commit protocol: a checkpoint is there whole or not at all, whatever dies and whenever.

    1. open      rank 0 sweeps what earlier attempts left and makes .tmp-step-N/
    2. write     every rank writes and syncs its files there
    3. prepare   all ranks exchange what they wrote; one failure anywhere abandons the attempt everywhere
    4. commit    rank 0 writes MANIFEST.json, syncs, renames .tmp-step-N to step-N (this is the commit), syncs
    5. announce  rank 0 tells the others; only now may anybody count the step as saved
    6. retain    rank 0 removes checkpoints beyond the wanted number, never the one just committed

A directory named step-N therefore always was complete when it got its name. Torch-free: the exchange between ranks
is a function, so the protocol is tested with plain processes that are killed at every phase.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.retention import retain, sweep
from trainer.checkpoint.verify import MANIFEST_NAME, Manifest, manifest_text, step_directory
from trainer.durable import make_directory, sync_directory, write_errors, write_file
from trainer.errors import CannotWriteError, SteadfastError

Exchange = Callable[[dict[str, Any]], list[dict[str, Any]]]
"""All-gather of one JSON object a rank, in rank order; every rank calls it and gets the same list."""


@dataclass(frozen=True)
class Writer:
    """What one rank contributes to a checkpoint."""

    rank: int
    write: Callable[[Path], dict[str, dict[str, Any]]]
    """Writes and syncs this rank's files below the given directory; relative name to {bytes, xxh3_128}."""
    exchange: Exchange
    on_phase: Callable[[str], None] = lambda phase: None
    """Called as each phase begins; fault tests stop the process here."""


def commit_checkpoint(
    checkpoints: Path,
    step: int,
    writer: Writer,
    describe: Callable[[dict[str, dict[str, Any]]], Manifest],
    keep: int,
    protected: Sequence[int] = (),
) -> Path:
    """Save one checkpoint; all ranks call this together and all return its path or all raise CannotWriteError.

    `describe` (rank 0) makes the manifest from the files' sizes and hashes. After an error the attempt's directory is
    gone and earlier checkpoints are untouched.
    """
    target = step_directory(checkpoints, step)
    attempt = attempt_directory(checkpoints, step)

    def open_here() -> dict[str, Any]:
        if writer.rank == 0:
            open_attempt(checkpoints, attempt)
        return {}

    writer.on_phase("open")
    _together(writer, open_here, attempt)
    writer.on_phase("write")
    reports = _together(writer, lambda: _write_files(writer, attempt), attempt)
    writer.on_phase("commit")
    files = {name: entry for report in reports for name, entry in sorted(report.items())}

    def publish_here() -> dict[str, Any]:
        if writer.rank == 0:
            publish(attempt, target, manifest_text(describe(files)), writer.on_phase)
        return {}

    _together(writer, publish_here, attempt)
    writer.on_phase("retain")
    if writer.rank == 0:
        retain(checkpoints, keep, newest=step, protected=protected)
    return target


def _together(writer: Writer, work: Callable[[], dict[str, Any]], attempt: Path) -> list[dict[str, Any]]:
    """Do this rank's part, exchange the outcome, and fail on all ranks when it failed on any."""
    try:
        mine: dict[str, Any] = {"result": work()}
    except SteadfastError as error:
        mine = {"fact": error.fact, "remedy": error.remedy}
    outcomes = writer.exchange(mine)
    for rank, outcome in enumerate(outcomes):
        if "fact" in outcome:
            if writer.rank == 0:
                abandon(attempt)
            raise CannotWriteError(f"rank {rank}: {outcome['fact']}", outcome["remedy"])
    return [outcome["result"] for outcome in outcomes]


def open_attempt(checkpoints: Path, attempt: Path) -> None:
    """Clear what earlier attempts left and make the directory of this one. Rank 0."""
    make_directory(checkpoints)
    with write_errors(checkpoints):
        sweep(checkpoints)
        attempt.mkdir()


def _write_files(writer: Writer, attempt: Path) -> dict[str, Any]:
    with write_errors(attempt):
        return writer.write(attempt)


def publish(attempt: Path, target: Path, manifest: str, on_phase: Callable[[str], None] = lambda phase: None) -> None:
    """The commit itself: the manifest, everything synced, and `attempt` becomes `target`.

    `on_phase` is told when only the rename is left. Raises CannotWriteError; `target` then is what it was before.
    """
    with write_errors(target):
        write_file(attempt / MANIFEST_NAME, manifest)
        for directory in (path for path in attempt.rglob("*") if path.is_dir()):
            sync_directory(directory)
        on_phase("rename")
        if target.exists():
            # Only a checkpoint that failed its verification is ever written again.
            target.rename(target.with_name(f".del-{target.name}"))
        attempt.rename(target)
        sync_directory(target.parent)
        shutil.rmtree(target.with_name(f".del-{target.name}"), ignore_errors=True)
        with suppress(CannotWriteError):
            # Only a hint for people: no reader trusts it, so it cannot fail a save that is committed.
            write_file(target.parent / "latest", target.name + "\n")


def attempt_directory(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it has its name."""
    return checkpoints / f".tmp-{step_directory(checkpoints, step).name}"


def abandon(attempt: Path) -> None:
    """Remove an attempt that came to nothing; nobody may be writing into it any more."""
    shutil.rmtree(attempt, ignore_errors=True)
