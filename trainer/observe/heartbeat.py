"""Where this rank is, told to its watchdog by a page of shared memory: about a microsecond a phase, no system call."""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path

from trainer.checkout import ROOT
from trainer.durable import write_errors
from trainer.errors import HangError
from trainer.observe.watchdog import EXIT_NOW, PAGE, Post, verdict_of

LEAST_SECONDS = 60.0
TIMES_P95 = 10.0
_STEPS_KEPT = 200
_STEPS_BETWEEN = 20
_DISMISS_SECONDS = 10.0
_START = (
    "import json, sys; sys.path.insert(0, sys.argv[1]); from trainer.observe.watchdog import Post, main; "
    "main(Post(**json.loads(sys.argv[2])), int(sys.argv[3]), int(sys.argv[4]))"
)
_OF_A_STEP = frozenset({"data", "forward", "backward", "step", "agree", "observe", "evaluate"})


class Heartbeat:
    """Call it with (phase, step) as each phase begins. A hang then ends the run with exit code 71 and a name.

    Args:
        post: whom to watch; `pid` is this process.
        hang_seconds: bound on each phase of a step; None: 60 seconds, or ten times the 95th percentile of a step's time
            if that is longer.
        timeout_seconds: that of the process group. Phases that may take long (loading, saving, the first step of a
            process) get nine tenths of it, so that the watchdog speaks before the collectives do, and three times as
            much when no rank waits for another one.
    """

    def __init__(self, post: Post, hang_seconds: float | None, timeout_seconds: float) -> None:
        self._post = post
        self._hang_seconds = hang_seconds
        self._longest = 0.9 * timeout_seconds
        self._marks = self._steps = 0
        self._bound = self._longest
        self._first_step: int | None = None
        self._step_began: float | None = None
        self._durations: deque[float] = deque(maxlen=_STEPS_KEPT)
        stacks = post.stacks(post.rank)
        with write_errors(stacks):
            stacks.parent.mkdir(parents=True, exist_ok=True)
            post.heartbeats.mkdir(parents=True, exist_ok=True)
            self._stacks = stacks.open("w")
        page_fd = os.memfd_create("heartbeat")
        os.ftruncate(page_fd, mmap.PAGESIZE)
        self._page = mmap.mmap(page_fd, mmap.PAGESIZE)
        self("start", 0)
        faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True)
        self._link, far = socket.socketpair()
        self._process = subprocess.Popen(
            [
                sys.executable, "-I", "-S", "-c", _START, str(ROOT), json.dumps(asdict(post)), str(page_fd),
                str(far.fileno()),
            ],
            pass_fds=(page_fd, far.fileno()), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        far.close()
        os.close(page_fd)
        threading.Thread(target=_obey, args=(self._link,), name="watchdog", daemon=True).start()

    def __call__(self, phase: str, step: int) -> None:
        """A phase of `step` begins."""
        now = time.monotonic()
        # The phases inside a save are not the same on all ranks, and marks are compared.
        self._marks += not phase.startswith("save:")
        if phase == "data":
            if self._step_began is not None:
                self._note_duration(now - self._step_began)
            self._step_began = now
        if self._first_step is None and phase == "data":
            self._first_step = step
        quick = phase in _OF_A_STEP and self._first_step is not None and step > self._first_step
        bound = self._bound if quick else self._longest
        PAGE.pack_into(self._page, 0, self._marks, step, now, bound, not quick, phase.encode()[:32])

    def close(self) -> None:
        """Dismiss the watchdog and remove the stacks; when the run was judged to hang, end with exit code 71.

        The ranks end one after another: what a rank sees then, a broken connection, is not why the run ended.
        """
        if verdict_of(self._post) is not None:
            os._exit(HangError.exit_code)
        faulthandler.unregister(signal.SIGUSR1)
        self._link.shutdown(socket.SHUT_RDWR)
        self._process.wait(_DISMISS_SECONDS)
        self._link.close()
        self._stacks.close()
        Path(self._stacks.name).unlink(missing_ok=True)

    def _note_duration(self, seconds: float) -> None:
        self._durations.append(seconds)
        self._steps += 1
        if self._steps % _STEPS_BETWEEN == 1:
            self._bound = step_bound(self._durations, self._hang_seconds, self._longest)


def step_bound(durations: deque[float], hang_seconds: float | None, longest: float) -> float:
    """How long a phase of a step may take, given the wall times of steps so far."""
    if hang_seconds is not None:
        return min(hang_seconds, longest)
    ordered = sorted(durations)
    p95 = ordered[int(0.95 * (len(ordered) - 1))] if ordered else 0.0
    return min(max(LEAST_SECONDS, TIMES_P95 * p95), longest)


def _obey(link: socket.socket) -> None:
    """End the process when the watchdog says so."""
    try:
        order = link.recv(1)
    except OSError:
        return
    if order == EXIT_NOW:
        os._exit(HangError.exit_code)
