"""When a checkpoint is due: every so many steps, or as often as loses least (`checkpoint.every_steps: auto`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from trainer.config.schema import Checkpoint

AddUp = Callable[[Sequence[float]], list[float]]
"""Element-wise sum over all ranks."""


class Advisor(Protocol):
    """What rank 0 knows about the time of the run."""

    def advised_steps(self) -> int | None:
        """Steps between saves that lose least; None before anything is known."""


def save_schedule(settings: Checkpoint, step: int, add_up: AddUp, advisor: Advisor | None) -> Callable[[int], bool]:
    """Whether a step is to be saved, for a run that goes on after `step`. All ranks call this, and what it returns.

    `advisor` is there on rank 0 only.
    """
    if settings.every_steps == "auto":
        return AutoInterval(settings.auto_at_least, settings.auto_at_most, step, add_up, advisor)
    every = settings.every_steps
    return lambda step: step % every == 0


class AutoInterval:
    """Saves as often as rank 0's measurements advise, within bounds; every rank hears it and so agrees.

    The interval is taken anew at each save that is due: failures, slower steps and longer saves change it.
    """

    def __init__(self, at_least: int, at_most: int, step: int, add_up: AddUp, advisor: Advisor | None) -> None:
        self._at_least = at_least
        self._at_most = at_most
        self._add_up = add_up
        self._advisor = advisor
        self._said = 0
        self._next = step + self._agreed()

    def __call__(self, step: int) -> bool:
        """Whether `step` is to be saved."""
        if step < self._next:
            return False
        self._next = step + self._agreed()
        return True

    def _agreed(self) -> int:
        steps = 0
        if self._advisor is not None:
            advised = self._advisor.advised_steps()
            # Nothing is known before the first save, so it comes early.
            steps = self._at_least if advised is None else min(max(advised, self._at_least), self._at_most)
            if advised is not None and abs(steps - self._said) > 0.1 * self._said:
                self._said = steps
                print(f"saving every {steps} steps from now on (checkpoint.every_steps: auto)", flush=True)
        return int(self._add_up([float(steps)])[0])
