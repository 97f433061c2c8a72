"""Which checkpoints may be removed: never the newest valid one, the best, one that is pinned or one being uploaded."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from trainer.checkpoint.verify import committed_steps, read_manifest, step_directory
from trainer.durable import write_errors, write_file
from trainer.errors import CheckpointError

EVALUATION = "evaluation"
"""Key of a manifest's provenance: metrics of the evaluation at the checkpoint's own step."""


def retain(checkpoints: Path, keep: int, newest: int, protected: Collection[int] = ()) -> list[int]:
    """Remove what `removable` names and return those steps. `newest` is known to be whole."""
    doomed = removable(checkpoints, keep, newest, protected)
    for step in doomed:
        discard(step_directory(checkpoints, step))
    return doomed


def removable(checkpoints: Path, keep: int, newest: int, protected: Collection[int] = ()) -> list[int]:
    """Steps before `newest` beyond the `keep` newest that neither are the best, nor pinned, nor `protected`."""
    older = [step for step in committed_steps(checkpoints) if step < newest]
    beyond = older[max(keep - 1, 0) :]
    if not beyond:
        return []
    safe = {best_step(checkpoints), *pinned_steps(checkpoints), *protected}
    return [step for step in beyond if step not in safe]


def best_step(checkpoints: Path) -> int | None:
    """Step of the checkpoint with the lowest evaluation loss, the newest of equals; None when none was evaluated."""
    losses = {step: loss for step in committed_steps(checkpoints) if (loss := evaluation_loss(checkpoints, step))}
    return min(losses, key=lambda step: (losses[step], -step), default=None)


def evaluation_loss(checkpoints: Path, step: int) -> float | None:
    """Evaluation loss at the step of a checkpoint, if it was evaluated there and its manifest is whole."""
    try:
        metrics = read_manifest(step_directory(checkpoints, step)).provenance.get(EVALUATION) or {}
        return min((float(value) for name, value in metrics.items() if name.endswith("/loss")), default=None)
    except (CheckpointError, AttributeError, TypeError, ValueError):
        return None


def pinned_steps(checkpoints: Path) -> set[int]:
    """Steps a person wants kept: each has an empty file step-N.pinned beside it."""
    names = (path.stem.removeprefix("step-") for path in checkpoints.glob("step-*.pinned"))
    return {int(name) for name in names if name.isdigit()}


def pin(checkpoints: Path, step: int) -> None:
    """Keep the checkpoint of `step` until `unpin`."""
    write_file(_pin_of(checkpoints, step), "")


def unpin(checkpoints: Path, step: int) -> None:
    """Let retention remove the checkpoint of `step` again."""
    with write_errors(checkpoints):
        _pin_of(checkpoints, step).unlink(missing_ok=True)


def sweep(checkpoints: Path) -> None:
    """Remove what killed attempts and removals left behind."""
    for pattern in (".tmp-*", ".del-*"):
        for path in checkpoints.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    for path in checkpoints.glob(".latest.*.tmp"):
        path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Remove a checkpoint: first its name, so that no half of it can be taken for a whole."""
    doomed = path.with_name(f".del-{path.name}")
    with suppress(OSError):
        # Removing an old checkpoint is housekeeping: it cannot fail a save that is committed.
        path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _pin_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"{step_directory(checkpoints, step).name}.pinned"
