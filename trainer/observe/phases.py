"""Where a rank is: every phase of its run is told to whoever listens (the watchdog's heartbeat, drills)."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.loop import OnPhase


class Phases:
    """Call it with (phase, step) as each phase begins; `listeners` are called in turn."""

    def __init__(self, listeners: Sequence[OnPhase]) -> None:
        self._listeners = listeners
        self._step = 0

    def __call__(self, phase: str, step: int) -> None:
        """A phase of `step` begins."""
        self._step = step
        for listener in self._listeners:
            listener(phase, step)

    def of_save(self, phase: str) -> None:
        """A phase of the commit protocol begins."""
        self(f"save:{phase}", self._step)
