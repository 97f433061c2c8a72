"""Which faults a drill has, and when: a pure function of its seed.

A drill is a number of rounds; a round is one run that is struck by up to five faults, one an attempt, and then left
to end. Each fault of a round has a stretch of steps of its own:

    steps of round 0    1 2 3 4 5 6 7 8 9 10 11 12 13 14 ...
    saved, evaluated      x   x   x   x   x     x     x
    fault 1                       ^ ^ ^
    fault 2                               ^  ^  ^
    fault 3                                           ^

Two checkpoints are there before the first fault, so that one of them may be damaged. The step after a stretch belongs
to nobody: an attempt that is asked to stop in the last step of its stretch may commit one step later. Torch-free.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from trainer.checkpoint.saving import MAX_FAILURES
from trainer.errors import UsageError
from trainer.observe.faults import Fault, fail_at

Kind = Literal["kill", "term", "stop", "enospc", "nan", "flip"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Place = Literal["load", "step", "evaluation", "mid-save", "commit"]
PHASES: dict[Place, tuple[str, ...]] = {
    "load": ("load", "restore"),
    "step": ("data", "forward", "backward", "step", "agree", "observe"),
    "evaluation": ("evaluate",),
    "mid-save": ("save", "save:write"),
    "commit": ("save:commit",),
}
BACKGROUND_PHASES: dict[Place, tuple[str, ...]] = PHASES | {
    "mid-save": ("save",),
    "commit": ("save:snapshot",),
}
"""Where checkpoints are written in the background, by a process of its own."""
FAULTS_A_ROUND = 5
SAVE_EVERY = 2
STRETCH = 4
KEEP = 3
WITHIN_SAVE_SECONDS = 0.03
"""A signal in phase `save` comes at a random moment up to this long after its beginning: wherever the save is then."""
PAUSE_SECONDS = 3.0
"""How long a rank waits where a fault comes from outside: the launcher is struck, or the disk filled, meanwhile."""


@dataclass(frozen=True)
class Strike:
    """One fault of a drill; each fires at the begin of its phase, but for those inside `save`."""

    kind: Kind
    victim: str
    """"rank 1", "all ranks" or "launcher"."""
    phase: str
    step: int
    outside: bool
    """Whether the drill acts from outside while the ranks wait there; else the ranks do it to themselves."""
    faults: tuple[Fault, ...]
    """What the ranks are told."""

    @property
    def codes(self) -> tuple[int, ...]:
        """Exit codes with which the attempt may end."""
        if self.kind == "nan":
            return (0,)
        if self.kind == "enospc":
            # A save that failed is given up, and the next one may work or not.
            return (0, 73)
        if self.victim == "launcher":
            return (75,) if self.kind == "term" else (-9,)
        return (69, 71) if self.kind == "stop" else (69,)

    def most_lost(self, background: bool) -> int:
        """Steps that may have to be done again.

        Those of the saves that are lost, and of the save that was to come; in the background, those of the one that
        training did not wait for, too.
        """
        lost = {"flip": 1, "enospc": MAX_FAILURES - 1}.get(self.kind, 0)
        return SAVE_EVERY * (lost + 1 + background)


@dataclass(frozen=True)
class Round:
    """One run and the faults that strike it, in order; those of a `nan` round all strike the same attempt."""

    strikes: tuple[Strike, ...]
    background: bool
    """Whether checkpoints are written in the background."""

    @property
    def poisoned(self) -> bool:
        """Whether its steps are skipped, so that it is compared with a run that skips the same ones."""
        return self.strikes[0].kind == "nan"


def steps_of(rounds: Sequence[Round]) -> int:
    """Optimizer steps that every run of the drill has."""
    return STRETCH * (max(len(each.strikes) for each in rounds) + 1) + SAVE_EVERY


def plan_drill(kinds: Sequence[Kind], count: int, seed: int, ranks: int, *, small_disk: bool) -> list[Round]:
    """`count` faults of `kinds`, each kind about equally often; `small_disk`: a real disk can be filled.

    Raises UsageError when there is nothing to plan.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UsageError(f"there is no fault {unknown[0]!r}", f"faults: {', '.join(KINDS)}")
    if count < 1 or not kinds or ranks < 1:
        raise UsageError("a drill needs a fault, a kind and a rank", "e.g. --faults kill --count 5 --nproc 2")
    chance = random.Random(seed)
    order = [kinds[index % len(kinds)] for index in range(count)]
    chance.shuffle(order)
    return [
        _round(part, chance, ranks, small_disk=small_disk, background=number % 2 == 1)
        for number, part in enumerate(_rounds(order))
    ]


def _rounds(order: Sequence[Kind]) -> list[list[Kind]]:
    """NaNs among themselves, and nothing after a full disk: a run that survives it goes on to its end."""
    nans: list[Kind] = [kind for kind in order if kind == "nan"]
    rest = [kind for kind in order if kind != "nan"]
    rounds = [nans[begin : begin + FAULTS_A_ROUND] for begin in range(0, len(nans), FAULTS_A_ROUND)]
    current: list[Kind] = []
    for kind in rest:
        current.append(kind)
        if kind == "enospc" or len(current) == FAULTS_A_ROUND:
            rounds.append(current)
            current = []
    if current:
        rounds.append(current)
    return rounds


def _round(kinds: Sequence[Kind], chance: random.Random, ranks: int, *, small_disk: bool, background: bool) -> Round:
    # An injected error needs the write to happen in the rank itself.
    background = background and (small_disk or "enospc" not in kinds)
    strikes = (
        _strike(kind, number, chance, ranks, small_disk=small_disk, background=background)
        for number, kind in enumerate(kinds, start=1)
    )
    return Round(tuple(strikes), background)


def _strike(
    kind: Kind, number: int, chance: random.Random, ranks: int, *, small_disk: bool, background: bool
) -> Strike:
    phases = BACKGROUND_PHASES if background else PHASES
    steps = range(STRETCH * number + 2, STRETCH * (number + 1) + 1)
    rank = chance.randrange(ranks)
    # A fault fires once in the life of a run: two of a round must not be equal, so their number is in their seconds.
    pause = PAUSE_SECONDS + number / 1000
    if kind == "nan":
        phase, step = chance.choice(("forward", "backward")), chance.choice(steps)
        return Strike(kind, f"rank {rank}", phase, step, False, (fail_at(rank, phase, step, "nan", number),))
    if kind == "enospc":
        step = chance.choice([step for step in steps if step % SAVE_EVERY == 0])
        if small_disk:
            return Strike(kind, "all ranks", "save", step, True, (fail_at(0, "save", step, "sleep", pause),))
        fault = fail_at(rank, "save:write", step, "enospc", number)
        return Strike(kind, f"rank {rank}", "save:write", step, False, (fault,))
    if kind == "flip" and background:
        # There must be a checkpoint before the damaged one: a save is sure to be committed when the next has begun.
        steps = steps[1:]
    # A checkpoint to damage must have been written by this very round.
    places = [place for place in phases if not (kind == "flip" and place == "load" and number == 1)]
    place = chance.choice(places)
    phase = chance.choice(phases[place])
    if place == "load":
        step = 0
    elif place == "step":
        step = chance.choice(steps)
    else:
        step = chance.choice([step for step in steps if step % SAVE_EVERY == 0])
    victims = ["a rank", "all ranks", "launcher"] if kind != "stop" else ["a rank"]
    victim = chance.choice(victims)
    if victim == "launcher":
        # Every rank waits: none may get ahead of the fault.
        pauses = tuple(fail_at(each, phase, step, "sleep", pause) for each in range(ranks))
        return Strike(kind, victim, phase, step, True, pauses)
    signal = "kill" if kind == "flip" else kind
    struck = range(ranks) if victim == "all ranks" else [rank]
    after = chance.uniform(0, WITHIN_SAVE_SECONDS) if phase == "save" else 0.0
    faults = tuple(fail_at(each, phase, step, signal, number, after=after) for each in struck)
    return Strike(kind, victim if victim == "all ranks" else f"rank {rank}", phase, step, False, faults)
