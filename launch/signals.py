"""What signals mean to a rank.

SIGUSR2 asks for an agreed checkpoint and a stop; it sets a flag that the loop reads at a step boundary. SIGTERM does
not ask for a save: it also means that a peer died, and a collective save would then hang; its default action (end at
once) is right. SIGINT belongs to the launcher, which turns it into SIGUSR2.

Ranks are started with SIGUSR2 blocked: a request that arrives while torch is still being imported waits until
`StopRequests.install` unblocks it, instead of killing a process that has no handler yet.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from types import FrameType

from trainer.errors import PeerLostError

_PR_SET_PDEATHSIG = 1


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


def die_with_parent(launcher_pid: int) -> str | None:
    """Have the kernel kill this process when its parent dies; returns why it cannot, or None.

    Raises PeerLostError when the launcher is already gone: it may die between starting us and this call, and then no
    signal would ever come.
    """
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} cannot kill a process with its parent; ranks outlive a launcher that is killed"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        return f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}"
    if os.getppid() != launcher_pid:
        raise PeerLostError(f"the launcher (pid {launcher_pid}) is gone", "start the same command again")
    return None
