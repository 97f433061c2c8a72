"""What signals mean to a rank.

SIGUSR2 asks for an agreed checkpoint and a stop; it sets a flag that the loop reads at a step boundary. SIGTERM does
not ask for a save: it also means that a peer died, and a collective save would then hang; its default action (end at
once) is right. SIGINT belongs to the launcher, which turns it into SIGUSR2.

Ranks are started with SIGUSR2 blocked: a request that arrives while torch is still being imported waits until
`StopRequests.install` unblocks it, instead of killing a process that has no handler yet.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from types import FrameType

from launch.contract import LAUNCHER_PID
from trainer.orphans import die_with_parent


class StopRequests:
    """A flag that asks for a stop. Any rank may hold one; the loop makes all ranks agree on it."""

    def __init__(self) -> None:
        self._requested: str | None = None

    @property
    def requested(self) -> str | None:
        """Why to stop (e.g. "SIGUSR2 at 14:03:22"), or None."""
        return self._requested

    def request(self, reason: str) -> None:
        """Ask for a stop; the first reason stays."""
        if self._requested is None:
            self._requested = reason

    def install(self) -> None:
        """Let SIGUSR2 set the flag. Call it from the main thread, before anything slow is imported."""
        signal.signal(signal.SIGUSR2, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.request(f"{signal.Signals(number).name} at {time.strftime('%H:%M:%S')}")


def die_with_launcher(environ: Mapping[str, str]) -> str | None:
    """Have this rank end with whoever launched it; returns why that is not possible, or None.

    torchrun and srun start their ranks themselves, so there the launcher is our parent. Somebody who sets the six
    variables by hand may well want the rank to outlive his shell. Raises PeerLostError when the launcher is gone.
    """
    if launcher := environ.get(LAUNCHER_PID):
        return die_with_parent(int(launcher))
    if "TORCHELASTIC_RUN_ID" in environ or "SLURM_STEP_ID" in environ:
        return die_with_parent(os.getppid())
    return None
