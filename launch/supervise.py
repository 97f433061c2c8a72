"""Watch the ranks of a run until all have ended: show what they say, pass on requests, name the first failure.

One broken rank takes the others down with it: their connections break, and they end a moment later (or a moment
*earlier*, as the launcher sees it) with exit code 69. So deaths are collected for two seconds before one is blamed,
and a rank that only lost a peer is never blamed when another one ended for a reason of its own.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from launch.processes import Ended, Event, Output
from trainer import errors
from trainer.cli import report
from trainer.errors import (
    HangError,
    Interrupted,
    NotEqualError,
    PeerLostError,
    RunLockedError,
    SteadfastError,
    StoppedOnRequest,
)
from trainer.run_directory import RunDirectory

GRACE_SECONDS = 10.0
SETTLE_SECONDS = 2.0
TIME_LIMIT = "time limit"

# What the exit codes of a rank say. 1 is Python's for an uncaught exception; only commands that compare mean it.
MEANINGS: dict[int, str] = {
    kind.exit_code: kind.meaning
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, SteadfastError) and kind is not NotEqualError
}
_RESUME = "start the same command again: it resumes from the last committed checkpoint"
_VICTIMS = (PeerLostError.exit_code, -signal.SIGTERM)
_SIGNAL_HINTS = {
    signal.SIGKILL: "when nobody sent it, memory ran out: see dmesg",
    signal.SIGSEGV: "a native library crashed",
    signal.SIGABRT: "a native library gave up",
    signal.SIGBUS: "often a full /dev/shm",
}


@dataclass(frozen=True)
class Ending:
    """How an attempt ended."""

    code: int
    """Exit code of the run."""
    asked: str = ""
    """Name of the signal that first asked for a stop, if any did; TIME_LIMIT when the deadline came first."""
    blamed: str = ""
    """The sentence that was said about the rank that failed first."""


class Ranks(Protocol):
    """The ranks of a run, on this host or on many."""

    def start(self) -> None:
        """Start every rank."""

    def next_events(self, timeout: float) -> list[Event]:
        """What happened since the last call; waits at most about `timeout` seconds."""

    def signal(self, number: int) -> None:
        """Send a signal to every living rank."""

    def close(self) -> None:
        """End everything that still lives."""


def supervise(
    ranks: Ranks,
    *,
    world_size: int,
    run_dir: Path,
    grace_seconds: float = GRACE_SECONDS,
    settle_seconds: float = SETTLE_SECONDS,
    deadline: float = float("inf"),
) -> Ending:
    """Start `ranks`, watch them to their end and say how the run ended.

    Its exit code is 0 when all ranks ended well, 75 when they did after a request to stop and rank 0 left its marker,
    130 after a second interrupt; else the code of the rank that failed first (69 when a signal killed it, 70 when the
    code is none of ours).
    At `deadline` (seconds since the epoch) what still runs is killed, with code 69: its checkpoint came too late.
    Call it from the main thread: SIGINT, SIGTERM and SIGUSR2 are handled here.
    """
    run = RunDirectory(run_dir)
    try:
        run.refuse_second_start()
    except RunLockedError as error:
        report(error)
        return Ending(error.exit_code, blamed=error.fact)
    run.forget_last_start()
    started = time.time()
    screen = Screen(world_size)
    running = set(range(world_size))
    failures: list[Ended] = []
    culprit: Ended | None = None
    blame_at = kill_at = float("inf")
    with _Requests() as requests:
        try:
            ranks.start()
            while running:
                for event in ranks.next_events(0.1):
                    if isinstance(event, Output):
                        screen.show(event)
                        continue
                    running.discard(event.rank)
                    if event.status != 0 and culprit is None:
                        failures.append(event)
                now = time.monotonic()
                if requests.kill:
                    return _interrupted(screen, requests.asked)
                if time.time() >= deadline:
                    late = "the time limit is near: all ranks were killed before they had ended by themselves"
                    screen.say(f"error: {late}")
                    return Ending(PeerLostError.exit_code, TIME_LIMIT, late)
                if (asked := requests.take()) is not None:
                    screen.say(
                        f"{asked}: asking all ranks for a checkpoint, then stopping (Ctrl-C again stops at once)"
                    )
                    ranks.signal(signal.SIGUSR2)
                if failures and blame_at == float("inf"):
                    blame_at = now + settle_seconds
                if culprit is None and failures and (now >= blame_at or not running):
                    culprit = blame(failures)
                    ranks.signal(signal.SIGTERM)
                    kill_at = now + grace_seconds
                if now >= kill_at:
                    ranks.signal(signal.SIGKILL)
                    kill_at = float("inf")
        finally:
            ranks.close()
    if culprit is not None:
        kept = run.error_report(culprit.rank)
        fresh = kept if _changed_since(kept, started) else None
        last_words = screen.last_words(culprit.rank)
        if culprit.status < 0 and _changed_since(run.hang, started):
            # A watchdog had to kill a rank that hung without letting go of the interpreter.
            verdict = f"{last_words.removeprefix('error: ')}; {_RESUME}"
            screen.say(f"error: {verdict}")
            return Ending(HangError.exit_code, requests.asked, verdict)
        sentence = describe(culprit, world_size, last_words, fresh)
        if sentence is not None:
            screen.say(f"error: {sentence}")
        return Ending(exit_code(culprit), requests.asked, sentence or last_words)
    if run.stopped.exists():
        screen.say(f"stopped on request with a committed checkpoint; {_RESUME}")
        return Ending(StoppedOnRequest.exit_code, requests.asked)
    return Ending(0, requests.asked)


def blame(failures: Sequence[Ended]) -> Ended:
    """The rank that broke the run: the first to end, those last that lost a peer or were told to end (SIGTERM)."""
    return min(failures, key=lambda ended: (ended.status in _VICTIMS and not ended.note, ended.when))


def exit_code(ended: Ended) -> int:
    """The exit code of a run whose first failure this is."""
    if ended.status < 0:
        return PeerLostError.exit_code
    return ended.status if ended.status in MEANINGS else 70


def describe(ended: Ended, world_size: int, last_words: str, report: Path | None) -> str | None:
    """One line: who failed, how, its last words, where its `report` is, what to do.

    None when a single rank has said it all itself.
    """
    who = f"rank {ended.rank} of {world_size}" if world_size > 1 else "the training process"
    if ended.host and not ended.note:
        who += f" on {ended.host}"
    remedies = []
    if ended.note:
        how = ended.note
        if not last_words.startswith("error: "):
            # Its end came from outside: what it happened to say before explains nothing.
            last_words = ""
    elif ended.status < 0:
        how = f"was killed by {_signal_name(-ended.status)} (pid {ended.pid}) at {_clock(ended.when)}"
        with contextlib.suppress(ValueError, KeyError):
            remedies.append(_SIGNAL_HINTS[signal.Signals(-ended.status)])
    elif world_size == 1 and last_words:
        return None
    else:
        meaning = f" ({MEANINGS[ended.status]})" if ended.status in MEANINGS else ""
        how = f"failed with exit code {ended.status}{meaning} at {_clock(ended.when)}"
    said = f": {last_words.removeprefix('error: ')}" if last_words else ""
    if report is not None and str(report) not in last_words:
        remedies.append(f"details in {report}")
    if exit_code(ended) in (69, 71):
        remedies.append(_RESUME)
    return "; ".join([f"{who} {how}{said}", *remedies])


class Screen:
    """Writes the lines of ranks and the launcher's own; remembers what each rank said last on stderr.

    What goes wrong for all ranks alike (a missing store, a refused resume) is said once: an error line, or one of the
    indented lines below it, is left out when another rank has said the same before.
    """

    def __init__(self, world_size: int) -> None:
        self._prefixes = world_size > 1
        self._last: dict[int, str] = {}
        self._error: dict[int, str] = {}
        self._said_by: dict[str, int] = {}
        self._inside_error: set[int] = set()
        self._dumping: set[int] = set()

    def show(self, output: Output) -> None:
        """Write a rank's line to the stream it came from, with the rank in front when there are several."""
        if output.stream == "stderr" and output.line.strip():
            # The dump of a fatal signal ends with the outermost frame; what the rank said before it says more.
            if output.line.startswith("Fatal Python error: ") and output.rank in self._last:
                self._dumping.add(output.rank)
            if output.rank not in self._dumping:
                self._last[output.rank] = output.line.strip()
            if output.line.startswith("error: "):
                self._error[output.rank] = output.line.strip()
            if self._said_before(output):
                return
        stream = sys.stdout if output.stream == "stdout" else sys.stderr
        # A reader that has gone away (`| head`) must not stop the training.
        with contextlib.suppress(OSError, ValueError):
            stream.write(f"{f'[rank {output.rank}] ' if self._prefixes else ''}{output.line}\n")
            stream.flush()

    def _said_before(self, output: Output) -> bool:
        if output.line.startswith("error: "):
            self._inside_error.add(output.rank)
        elif not output.line.startswith("  "):
            self._inside_error.discard(output.rank)
        if output.rank not in self._inside_error:
            return False
        return self._said_by.setdefault(output.line, output.rank) != output.rank

    def say(self, sentence: str) -> None:
        """Write the launcher's own line to stderr."""
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"{sentence}\n")
            sys.stderr.flush()

    def last_words(self, rank: int) -> str:
        """The rank's error line, else the last thing it wrote to stderr before it died."""
        return self._error.get(rank) or self._last.get(rank, "")


class _Requests:
    """Signals to the launcher, as flags that the main loop reads; the old handlers come back at the end."""

    def __init__(self) -> None:
        self.kill = False
        self.asked = ""
        self._new: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> _Requests:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def take(self) -> str | None:
        """The name of the signal that first asked for a stop, once."""
        new, self._new = self._new, None
        return new

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Schedulers repeat SIGTERM; only a second Ctrl-C of a human means "at once".
        if self.asked and number == signal.SIGINT:
            self.kill = True
        elif not self.asked:
            self.asked = self._new = signal.Signals(number).name


def _interrupted(screen: Screen, asked: str) -> Ending:
    screen.say("error: interrupted: all ranks were killed; committed checkpoints are untouched")
    return Ending(Interrupted.exit_code, asked, "interrupted")


def _changed_since(path: Path, moment: float) -> bool:
    try:
        # A second of slack: file systems round times, and file servers have clocks of their own.
        return path.stat().st_mtime > moment - 1.0
    except OSError:
        return False


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _clock(when: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(when))
