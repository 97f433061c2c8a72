"""The watchdog of a rank: a small process beside it that lives on when the rank hangs, is stopped or holds the GIL.

It reads the page of memory in which the rank says where it is (`trainer.observe.heartbeat`), without disturbing it, and
tells it to the other watchdogs by a file in run.dir/heartbeats. When no rank of the run has moved within the bound:

    every watchdog has its rank dump its Python stacks to run.dir/errors   (a C signal handler, needs no GIL)
    every watchdog judges from files and stacks who holds up the run       (trainer.observe.verdict)
    the first writes run.dir/errors/hang.json, all say the verdict on stderr
    every watchdog has its rank end with exit code 71, and kills one that cannot

Nothing here waits for a file system: files are read and written in threads that are left behind when they hang.
Standard library only, and no import of trainer beyond the judgement: it starts in some ten milliseconds.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trainer.observe.verdict import KERNEL, RUNNING, SILENT, STOPPED, Sighting, Verdict, judge, read_stacks

PAGE = struct.Struct("<Qqdd?32s")
"""Marks, step, monotonic time of the newest mark, bound in seconds, whether it may take longer, phase."""
EXIT_NOW = b"x"
PATIENCE = 3.0
"""Times the bound that a patient phase may take although nobody waits for it."""
_FILE_SECONDS = 3.0
_DUMP_SECONDS = 2.0
_EXIT_SECONDS = 2.0
_STATES = {"T": STOPPED, "t": STOPPED, "D": KERNEL}
Result = TypeVar("Result")


@dataclass(frozen=True)
class Post:
    """Whom a watchdog watches, and where the others leave their files."""

    rank: int
    world_size: int
    pid: int
    run_dir: str
    attempt: str
    """The same on all ranks of one start: files of another start say nothing."""

    @property
    def heartbeats(self) -> Path:
        """Where all watchdogs leave their files."""
        return Path(self.run_dir) / "heartbeats"

    def heartbeat(self, rank: int) -> Path:
        """The file of a rank's watchdog."""
        return self.heartbeats / f"rank-{rank:05d}.json"

    def stacks(self, rank: int) -> Path:
        """The stacks of a rank."""
        return Path(self.run_dir) / "errors" / f"rank-{rank}.stacks.txt"

    def report(self, rank: int) -> Path:
        """What ended a rank; as `RunDirectory.error_report`."""
        return Path(self.run_dir) / "errors" / f"rank-{rank}.txt"

    @property
    def hang(self) -> Path:
        """The verdict; as `RunDirectory.hang`."""
        return Path(self.run_dir) / "errors" / "hang.json"


@dataclass(frozen=True)
class Mark:
    """What the page says."""

    marks: int
    step: int
    since: float
    bound: float
    patient: bool
    """The phase may take longer than its bound (loading a model from a slow disk) as long as no rank waits for it."""
    phase: str


def read_page(page: mmap.mmap) -> Mark:
    """The newest mark; read until two readings agree, because the rank may be writing."""
    while True:
        first, second = page[: PAGE.size], page[: PAGE.size]
        if first == second:
            marks, step, since, bound, patient, phase = PAGE.unpack(first)
            return Mark(marks, step, since, bound, patient, phase.rstrip(b"\0").decode(errors="replace"))


def verdict_of(post: Post) -> Verdict | None:
    """The verdict over this attempt, when there is one."""
    entry = _read(post.hang)
    if not entry or entry.get("attempt") != post.attempt:
        return None
    return Verdict(tuple(entry["ranks"]), entry["verdict"])


def main(post: Post, page_fd: int, link_fd: int) -> None:
    """Watch until the rank has ended or was ended."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        # What is sent to the group of the rank is not meant for us: we end with the rank.
        signal.signal(number, signal.SIG_IGN)
    page = mmap.mmap(page_fd, mmap.PAGESIZE, prot=mmap.PROT_READ)
    link = socket.socket(fileno=link_fd)
    watch = _Watch(post, page)
    last = awake_since = time.monotonic()
    acquitted_until = 0.0
    # A child of the rank may hold its end of the link open.
    while not _ended(link, watch.interval) and os.getppid() == post.pid:
        now = time.monotonic()
        if now - last > 2 * watch.interval + 5.0:
            # We were suspended ourselves, probably together with all others.
            awake_since = now
        last = now
        mark = read_page(page)
        age = now - max(mark.since, awake_since)
        stalled = age > mark.bound
        watch.publish(mark, stalled)
        if not stalled or now < acquitted_until or not watch.all_stand_still():
            continue
        verdict = watch.judge(strict=not mark.patient or age > PATIENCE * mark.bound)
        if verdict is not None:
            watch.end_rank(verdict, link)
            return
        acquitted_until = now + mark.bound / 4


class _Watch:
    def __init__(self, post: Post, page: mmap.mmap) -> None:
        self._post = post
        self._page = page
        self._beat = 0
        self._judged = False
        self._heard: dict[int, tuple[int, float]] = {}
        self._pending: threading.Thread | None = None
        self._host = socket.gethostname()

    @property
    def interval(self) -> float:
        """Seconds between two looks at the page."""
        bound = read_page(self._page).bound
        return min(max(bound / 20, 0.2), 5.0)

    def publish(self, mark: Mark, stalled: bool) -> None:
        """Tell the others where our rank is."""
        self._beat += 1
        entry = {
            "attempt": self._post.attempt, "rank": self._post.rank, "host": self._host, "pid": self._post.pid,
            "beat": self._beat, "interval": self.interval, "marks": mark.marks, "phase": mark.phase, "step": mark.step,
            "age": time.monotonic() - mark.since, "state": _state(self._post.pid), "stalled": stalled,
            "judged": self._judged,
        }  # fmt: skip
        if self._pending is not None and self._pending.is_alive():
            return
        self._pending = threading.Thread(
            target=_replace, args=(self._post.heartbeat(self._post.rank), json.dumps(entry)), daemon=True
        )
        self._pending.start()
        self._pending.join(_FILE_SECONDS)

    def all_stand_still(self) -> bool:
        """Whether every rank is known not to move; a rank that nothing is heard of stands still too."""
        beats = self._beats()
        return all(self._is_still(rank, beats.get(rank)) for rank in range(self._post.world_size))

    def judge(self, strict: bool) -> Verdict | None:
        """Have our rank dump its stacks, wait for those of the others, and judge.

        Unless `strict`, None when no rank waits for another one: then all are merely slow.
        """
        with suppress(OSError):
            os.kill(self._post.pid, signal.SIGUSR1)
        self._wait(_DUMP_SECONDS, lambda: all(_settled(self._stacks(rank)) for rank in self._running()))
        beats = self._beats()
        seen = [self._sighting(rank, beats.get(rank)) for rank in range(self._post.world_size)]
        if not strict and not any(sighting.collective for sighting in seen):
            return None
        verdict = judge(seen)
        heard = [rank for rank, beat in beats.items() if not self._is_silent(rank, beat)]
        if self._post.rank == min(heard, default=self._post.rank):
            entry = {"attempt": self._post.attempt, "ranks": verdict.ranks, "verdict": verdict.sentence}
            _within(_FILE_SECONDS, lambda: _replace(self._post.hang, json.dumps(entry)))
        else:
            # All say the same; ours may differ by a second.
            self._wait(_DUMP_SECONDS, lambda: self._verdict_of_the_first() is not None)
            verdict = self._verdict_of_the_first() or verdict
        text = f"{verdict.sentence}\n{self._stacks(self._post.rank)}"
        _within(_FILE_SECONDS, lambda: _replace(self._post.report(self._post.rank), text))
        return verdict

    def end_rank(self, verdict: Verdict, link: socket.socket) -> None:
        """Say the verdict, let the others judge too, then end the rank."""
        stacks = self._post.stacks(self._post.rank).parent
        with suppress(OSError):
            sys.stderr.write(f"error: {verdict.sentence}; the stacks of all ranks are in {stacks}\n")
            sys.stderr.flush()
        self._judged = True
        self.publish(read_page(self._page), stalled=True)
        self._wait(_DUMP_SECONDS, lambda: all(beat["judged"] for beat in self._beats(running=True).values()))
        with suppress(OSError):
            link.sendall(EXIT_NOW)
        if not _ended(link, _EXIT_SECONDS):
            with suppress(OSError):
                os.kill(self._post.pid, signal.SIGKILL)

    def _verdict_of_the_first(self) -> Verdict | None:
        return _within(_FILE_SECONDS, lambda: verdict_of(self._post))

    def _is_still(self, rank: int, beat: dict[str, Any] | None) -> bool:
        return rank == self._post.rank or self._is_silent(rank, beat) or (beat is not None and bool(beat["stalled"]))

    def _running(self) -> list[int]:
        """Ranks that can dump their stacks."""
        beats = self._beats()
        return [rank for rank, beat in beats.items() if beat["state"] != STOPPED and not self._is_silent(rank, beat)]

    def _beats(self, running: bool = False) -> dict[int, dict[str, Any]]:
        ranks = self._running() if running else range(self._post.world_size)
        found = _within(_FILE_SECONDS, lambda: {rank: _read(self._post.heartbeat(rank)) for rank in ranks}) or {}
        return {rank: beat for rank, beat in found.items() if beat and beat.get("attempt") == self._post.attempt}

    def _is_silent(self, rank: int, beat: dict[str, Any] | None) -> bool:
        """Whether a watchdog has said nothing new for three of its intervals since we listen."""
        now = time.monotonic()
        number = beat["beat"] if beat else 0
        heard, since = self._heard.get(rank, (-1, now))
        if heard != number:
            self._heard[rank] = (number, now)
            return False
        patience = 3 * (beat["interval"] if beat else 5.0) + _FILE_SECONDS
        return now - since > patience

    def _sighting(self, rank: int, beat: dict[str, Any] | None) -> Sighting:
        if beat is None:
            return Sighting(rank, "an unknown host", 0, "the start", 0, 0.0, SILENT)
        state = SILENT if self._is_silent(rank, beat) and rank != self._post.rank else beat["state"]
        collective, place = read_stacks(self._stacks(rank))
        return Sighting(
            rank, beat["host"], beat["marks"], beat["phase"], beat["step"], beat["age"], state, collective, place
        )

    def _stacks(self, rank: int) -> str:
        return _within(_FILE_SECONDS, lambda: _text(self._post.stacks(rank))) or ""

    def _wait(self, seconds: float, done: Callable[[], bool]) -> None:
        end = time.monotonic() + seconds
        while not done() and time.monotonic() < end:
            time.sleep(0.1)


def _settled(stacks: str) -> bool:
    """Whether a dump is complete: the main thread comes last, and its last frame is that of the program."""
    return bool(stacks) and stacks.rstrip().endswith("in <module>")


def _ended(link: socket.socket, seconds: float) -> bool:
    """Wait at most so long for the rank to end, or to dismiss us."""
    return bool(select.select([link], [], [], seconds)[0])


def _state(pid: int) -> str:
    """What the kernel says about the main thread of a process of this host."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return RUNNING
    return _STATES.get(letter, RUNNING)


def _within(seconds: float, action: Callable[[], Result]) -> Result | None:
    """The result of `action`, or None when it takes longer or fails."""
    results: list[Result] = []

    def work() -> None:
        with suppress(OSError, ValueError):
            results.append(action())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        temporary.replace(path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        entry = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return entry if isinstance(entry, dict) else None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
