"""What happens after an attempt at a run has ended: done, another attempt, or give up. One pure function.

    all ranks agreed on a checkpoint     the scheduler asked: again; a person asked: stop (75)
    all ranks ended well                 done, when the run directory says so too
    a person asked for a stop            stop, whatever came of it
    usage, data, refusals, divergence    give up: the same start would end the same way
    the last step is committed           done, whatever broke afterwards
    the scheduler asked, nothing saved   again from the last commit, unless 20 attempts in a row got no further
    anything else is a crash             again from the last commit, at most twice from the same one

The marker of an agreed stop is looked at before any exit code: ranks that saved end with 0, as ranks that are done do,
and srun passes on the highest code of many. What is left of a crash is counted by the checkpoint it left behind, not
by a scheduler's restart counter, which also counts preemptions and lost nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.errors import (
    CannotWriteError,
    CheckpointError,
    DataError,
    DivergedError,
    Interrupted,
    MissingInputError,
    PeerLostError,
    ResumeRefusedError,
    RunLockedError,
    SteadfastError,
    StoppedOnRequest,
    UsageError,
)

CRASHES_ALLOWED = 2
FRUITLESS_ALLOWED = 20
# The same start would end the same way, or needs a person first.
REFUSALS: dict[int, str] = {
    kind.exit_code: kind.meaning
    for kind in (
        UsageError, DataError, MissingInputError, CannotWriteError, CheckpointError, ResumeRefusedError, DivergedError,
        Interrupted,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Attempt:
    """How one attempt ended."""

    exit_code: int
    """As `launch.supervise` tells it: that of the rank that failed first."""
    committed: int
    """Newest committed step at the end; 0 when there is no checkpoint."""
    saved: bool = False
    """Rank 0 left its marker: all ranks agreed on a checkpoint and stopped."""
    finished: bool = False
    """The run directory says that the last step of this very configuration is committed."""
    asked_by: Literal["nobody", "scheduler", "person"] = "nobody"
    """Who asked the attempt to stop, if anybody did. An attempt lost with its host counts as the scheduler's."""


@dataclass(frozen=True)
class Done:
    """The run is complete."""

    exit_code: int = 0


@dataclass(frozen=True)
class Requeue:
    """Start again; it resumes from the last committed checkpoint."""

    why: str


@dataclass(frozen=True)
class GiveUp:
    """End with `exit_code`."""

    exit_code: int
    why: str


Decision = Done | Requeue | GiveUp


def decide(history: Sequence[Attempt], *, max_restarts: int | None = None) -> Decision:
    """What to do after the last of `history`: the attempts of one job or command, oldest first, at least one.

    `max_restarts` bounds the restarts of all kinds together; None: no bound but the rules above.
    """
    decision = _decide(history)
    if isinstance(decision, Requeue) and max_restarts is not None and len(history) > max_restarts:
        code = StoppedOnRequest.exit_code if history[-1].saved else history[-1].exit_code
        return GiveUp(code, f"no restart is left of {max_restarts}")
    return decision


def _decide(history: Sequence[Attempt]) -> Decision:
    last = history[-1]
    place = f"step {last.committed}" if last.committed else "the beginning"
    if last.saved:
        if last.asked_by == "scheduler":
            return Requeue(f"stopped on request at step {last.committed}, which is committed")
        return GiveUp(StoppedOnRequest.exit_code, f"stopped on request at step {last.committed}, which is committed")
    if last.exit_code == 0:
        if last.finished:
            return Done()
        return GiveUp(SteadfastError.exit_code, "all ranks ended well, but outcome.json does not say the run is done")
    if last.asked_by == "person":
        return GiveUp(last.exit_code, f"it was asked to stop, and could not save; {place} is committed")
    if last.exit_code in REFUSALS:
        return GiveUp(last.exit_code, f"a restart does not help: {REFUSALS[last.exit_code]}")
    if last.exit_code == RunLockedError.exit_code and len(history) == 1:
        # Later on it may be the lock of our own lost host, which a file server keeps for a minute or two.
        return GiveUp(last.exit_code, "another run has this run directory")
    if last.finished:
        return Done()
    here = [attempt for attempt in history if not attempt.saved and attempt.committed == last.committed]
    if last.asked_by == "scheduler":
        if len(here) > FRUITLESS_ALLOWED:
            return GiveUp(
                last.exit_code, f"interrupted {len(here)} times before anything after {place} could be committed"
            )
        return Requeue(f"interrupted before it could save; resuming from {place}")
    crashes = sum(attempt.asked_by == "nobody" for attempt in here)
    if crashes > CRASHES_ALLOWED:
        return GiveUp(last.exit_code, f"crashed {crashes} times at {place}")
    what = "lost a rank" if last.exit_code == PeerLostError.exit_code else f"failed with exit code {last.exit_code}"
    return Requeue(f"{what}; restart {crashes} of at most {CRASHES_ALLOWED} from {place}")
