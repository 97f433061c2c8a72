"""A run on this machine, afterwards: its state and its end. See `launch.places`."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Any

from trainer.errors import MissingInputError


def reference() -> dict[str, Any]:
    """What finds this launcher again."""
    return {"place": "local", "host": socket.gethostname(), "pid": os.getpid()}


def state(reference: dict[str, Any]) -> str:
    """Whether the launcher is alive."""
    place = f"process {reference['pid']} on {reference['host']}"
    if reference["host"] != socket.gethostname():
        return f"{place}: another machine"
    return f"{place}: {'running' if _is_alive(reference['pid']) else 'ended'}"


def logs(reference: dict[str, Any], *, lines: int, follow: bool) -> int:
    """Raise MissingInputError: a local run writes where it was started."""
    raise MissingInputError(
        "a local run writes to the terminal it was started in", "see metrics.jsonl and events.jsonl of the run"
    )


def stop(reference: dict[str, Any], *, graceful: bool) -> str:
    """End the launcher, and with it its ranks: at once, or after an agreed checkpoint.

    Raises MissingInputError when it does not run on this machine.
    """
    pid = reference["pid"]
    if reference["host"] != socket.gethostname() or not _is_alive(pid):
        raise MissingInputError(f"no run to stop: {state(reference)}")
    os.kill(pid, signal.SIGTERM if graceful else signal.SIGKILL)
    return f"asked process {pid} for a checkpoint and a stop" if graceful else f"killed process {pid} and its ranks"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        # The number may belong to somebody else by now.
        return b"steadfast" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True
