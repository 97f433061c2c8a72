"""Ends what ranks have started when their launcher is killed; a process of its own, run as a script.

The kernel kills a rank with its launcher, but not the rank's children (a compiler, a worker): nobody is left who would.
Every rank leads a process group. The launcher writes `+GROUP` and `-GROUP` lines to our standard input as ranks start
and end; when it is gone, the pipe ends, and the groups that are left are killed. Imports nothing of ours: it starts in
a few hundredths of a second.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys


def main() -> None:
    """Keep the list of groups until the launcher is gone, then kill them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        change, group = line[0], int(line[1:])
        if change == "+":
            groups.add(group)
        else:
            groups.discard(group)
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
