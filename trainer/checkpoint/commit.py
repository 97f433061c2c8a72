"""The commit protocol: a checkpoint is there whole or not at all, whatever dies and whenever.

    1. open      rank 0 sweeps what earlier attempts left and makes .tmp-step-N/
    2. write     every rank writes and syncs its files there
    3. prepare   all ranks exchange what they wrote; one failure anywhere abandons the attempt everywhere
    4. commit    rank 0 writes MANIFEST.json, syncs, renames .tmp-step-N to step-N (this is the commit), syncs
    5. announce  rank 0 tells the others; only now may anybody count the step as saved
    6. retain    rank 0 removes checkpoints beyond the wanted number, never the one just committed

A run that lost its directory to another start (`run_lock`) finds out before the rename, on all ranks, and ends.

A directory named step-N therefore always was complete when it got its name. Torch-free: the exchange between ranks
is a function, so the protocol is tested with plain processes that are killed at every phase.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.retention import retain, sweep
from trainer.checkpoint.verify import MANIFEST_NAME, Manifest, manifest_text, step_directory
from trainer.durable import make_directory, sync_directory, write_errors, write_file
from trainer.errors import CannotWriteError, DivergedError, RunLockedError, SteadfastError

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
    guard: Callable[[], None] = lambda: None,
) -> Path:
    """Save one checkpoint; all ranks call this together and all return its path or all raise the same error.

    `describe` (rank 0) makes the manifest from the files' sizes and hashes; `guard` (rank 0) raises RunLockedError when
    the directory belongs to another run by now. Raises CannotWriteError, or DivergedError when weights are not finite;
    then the attempt's directory is gone and earlier checkpoints are untouched.
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
            publish(attempt, target, manifest_text(describe(files)), writer.on_phase, guard)
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
        mine = failure(error)
    outcomes = writer.exchange(mine)
    if (problem := common_error(outcomes)) is not None:
        if writer.rank == 0:
            abandon(attempt, problem)
        raise problem
    return [outcome["result"] for outcome in outcomes]


def failure(error: BaseException) -> dict[str, Any]:
    """The outcome that tells the other ranks (or, from a writer process, its rank) what went wrong."""
    if isinstance(error, SteadfastError):
        return {"fact": error.fact, "remedy": error.remedy, "code": error.exit_code}
    return {"fact": f"{type(error).__name__}: {error}", "remedy": "", "code": CannotWriteError.exit_code}


def common_error(outcomes: Iterable[dict[str, Any]]) -> SteadfastError | None:
    """What all ranks make of the outcomes of all: None when all went well.

    RunLockedError or DivergedError when that is what happened to any rank, else CannotWriteError with its rank.
    """
    failed = [(rank, outcome) for rank, outcome in enumerate(outcomes) if "fact" in outcome]
    for kind in (RunLockedError, DivergedError):
        for _, outcome in failed:
            if outcome["code"] == kind.exit_code:
                return kind(outcome["fact"], outcome["remedy"])
    return next((CannotWriteError(f"rank {rank}: {one['fact']}", one["remedy"]) for rank, one in failed), None)


def open_attempt(checkpoints: Path, attempt: Path) -> None:
    """Clear what earlier attempts left and make the directory of this one. Rank 0."""
    make_directory(checkpoints)
    with write_errors(checkpoints):
        sweep(checkpoints)
        attempt.mkdir()


def _write_files(writer: Writer, attempt: Path) -> dict[str, Any]:
    with write_errors(attempt):
        return writer.write(attempt)


def publish(
    attempt: Path,
    target: Path,
    manifest: str,
    on_phase: Callable[[str], None] = lambda phase: None,
    guard: Callable[[], None] = lambda: None,
) -> None:
    """The commit itself: the manifest, everything synced, and `attempt` becomes `target`.

    `on_phase` is told when only the rename is left, then `guard` may still refuse it. Raises CannotWriteError or what
    `guard` raises; `target` then is what it was before.
    """
    with write_errors(target):
        write_file(attempt / MANIFEST_NAME, manifest)
        for directory in (path for path in attempt.rglob("*") if path.is_dir()):
            sync_directory(directory)
        on_phase("rename")
        guard()
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


def abandon(attempt: Path, reason: BaseException | None = None) -> None:
    """Remove an attempt that came to nothing; nobody may be writing into it any more.

    Not when the directory was lost to another run: the attempt of that name may be its own, and it sweeps.
    """
    if not isinstance(reason, RunLockedError):
        shutil.rmtree(attempt, ignore_errors=True)


def require_room(checkpoints: Path, needed: int) -> None:
    """Raise CannotWriteError when the disk of `checkpoints` has less than `needed` bytes left."""
    with write_errors(checkpoints):
        free = shutil.disk_usage(checkpoints).free
    if needed > free:
        raise CannotWriteError(
            f"the checkpoint needs {needed / 2**20:,.0f} MiB and {checkpoints} has {free / 2**20:,.0f} MiB left",
            "make room",
        )
