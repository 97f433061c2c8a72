"""One process at a time: a lock that the kernel gives up when its holder ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from pathlib import Path
from typing import IO

from trainer.durable import write_errors
from trainer.errors import RunLockedError


def take_lock(file: Path, what: str, remedy: str) -> IO[str]:
    """Lock `file` (made if need be) until the returned stream is closed or the process ends; `what` is its name.

    Raises RunLockedError, with the holder and `remedy`, when another process has it.
    """
    with write_errors(file):
        stream = file.open("a+")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if not isinstance(error, BlockingIOError):
            # Some cluster file systems know no locks; that must not forbid work there.
            sys.stderr.write(f"warning: {what} cannot be locked ({error.strerror}): start only one at a time\n")
            return stream
        stream.seek(0)
        holder = stream.read().strip() or "another process"
        stream.close()
        raise RunLockedError(f"{what} is in use by {holder}", remedy) from error
    stream.seek(0)
    stream.truncate()
    stream.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    stream.flush()
    return stream
