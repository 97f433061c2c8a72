"""No process outlives the one that started it: ranks their launcher, build workers their build."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from trainer.errors import PeerLostError

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> str | None:
    """Have the kernel kill this process when its parent dies; returns why it cannot, or None.

    Raises PeerLostError when the parent is already gone: it may die between starting us and this call, and then no
    signal would ever come.
    """
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} cannot kill a process with its parent; processes outlive a parent that is killed"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        return f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}"
    if os.getppid() != parent_pid:
        raise PeerLostError(f"the launcher (pid {parent_pid}) is gone", "start the same command again")
    return None
