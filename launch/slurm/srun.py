"""The ranks of a Slurm job behind the interface of `supervise`: one srun whose output carries everything they say.

srun puts the number of the task before every line (--label). Two kinds of lines are the tasks' own, not the ranks':
that a rank was started, and how it ended. Everything that travels the same way arrives in order, and no shared file
system has to be quick.
"""

from __future__ import annotations

import contextlib
import json
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Literal

from launch.processes import Ended, Event, Output
from trainer.errors import CannotWriteError, PeerLostError

STARTED = "steadfast-rank-started "
ENDED = "steadfast-rank-ended "
_LABEL = re.compile(r" *(\d+): ?(.*)", re.DOTALL)
_LOST_NODE = re.compile(r"srun: error: Node failure on (\S+)")
_KILL_PATIENCE_SECONDS = 15.0
# What ranks wrote last may still be on its way when their ends have arrived; srun then ends by itself.
_OUTPUT_PATIENCE_SECONDS = 10.0


@dataclass(frozen=True)
class Started:
    """A task has started its rank; `step` is the srun step as scancel names it."""

    rank: int
    host: str
    step: str


@dataclass(frozen=True)
class Remark:
    """A line of srun or slurmstepd itself."""

    line: str


def read_line(line: str, stream: Literal["stdout", "stderr"]) -> list[Event | Started | Remark]:
    """What one line of srun's output says. A rank's last line without an end may stand before the task's own word."""
    match = _LABEL.fullmatch(line)
    if match is None:
        return [Remark(line)]
    rank, text = int(match[1]), match[2]
    if stream == "stderr":
        for word in (STARTED, ENDED):
            before, found, rest = text.partition(word)
            if not found:
                continue
            with contextlib.suppress(ValueError, KeyError, TypeError):
                details = json.loads(rest)
                said: list[Event | Started | Remark] = [Output(rank, stream, before)] if before else []
                if word == STARTED:
                    return [*said, Started(rank, details["host"], details["step"])]
                ended = Ended(rank, details["pid"], details["status"], details["when"], host=details["host"])
                return [*said, ended]
    return [Output(rank, stream, text)]


class SrunRanks:
    """`command` is the whole srun command line; its tasks are `launch.slurm.task`.

    `lost_hosts` are those that Slurm has said to be gone.
    """

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], *, world_size: int) -> None:
        self._command, self._environ = [*command], {**environ}
        self._running = set(range(world_size))
        self._started: dict[int, Started] = {}
        self._waiting_signals: list[int] = []
        self._lines: queue.Queue[tuple[Literal["stdout", "stderr"], str] | None] = queue.Queue(10_000)
        self.lost_hosts: list[str] = []
        self._last_end: tuple[Ended, float] | None = None
        self._last_remark = ""
        self._srun: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start srun. Raises CannotWriteError when there is none."""
        try:
            self._srun = subprocess.Popen(
                self._command,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise CannotWriteError(f"cannot start srun: {error}", "is Slurm installed on this node?") from error
        readers = [
            threading.Thread(target=self._read, args=("stdout", self._srun.stdout), daemon=True),
            threading.Thread(target=self._read, args=("stderr", self._srun.stderr), daemon=True),
        ]
        for reader in readers:
            reader.start()
        threading.Thread(target=self._wait, args=(readers,), daemon=True).start()

    def next_events(self, timeout: float) -> list[Event]:
        """See `supervise.Ranks`; when srun has ended, so have all ranks that said nothing of their end."""
        events: list[Event] = []
        end = time.monotonic() + timeout
        while len(events) < 10_000:
            try:
                entry = self._lines.get(timeout=max(0.0, end - time.monotonic()) if not events else 0)
            except queue.Empty:
                break
            events += self._silent_ends() if entry is None else self._understood(*entry)
        if self._last_end is not None and time.monotonic() > self._last_end[1]:
            events += self._take_last_end()
        return events

    def signal(self, number: int) -> None:
        """Ask the tasks for what `number` means to a rank, as soon as all of them are there to hear it."""
        if number == signal.SIGKILL:
            self._kill()
            return
        self._waiting_signals.append(number)
        self._send_waiting()

    def close(self) -> None:
        """End the step, if it still lives."""
        if self._srun is None or self._srun.poll() is not None:
            return
        if self._running:
            self._kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._srun.wait(_KILL_PATIENCE_SECONDS)
            return
        self._srun.kill()
        self._srun.wait()

    def _understood(self, stream: Literal["stdout", "stderr"], line: str) -> list[Event]:
        events: list[Event] = []
        for said in read_line(line, stream):
            if isinstance(said, Started):
                self._started[said.rank] = said
                self._send_waiting()
            elif isinstance(said, Remark):
                events += self._remark(said.line)
            elif not isinstance(said, Ended):
                events.append(said)
            elif said.rank in self._running:
                self._running.discard(said.rank)
                if self._running:
                    events.append(said)
                else:
                    self._last_end = (said, time.monotonic() + _OUTPUT_PATIENCE_SECONDS)
        return events

    def _take_last_end(self) -> list[Event]:
        ended, self._last_end = self._last_end, None
        return [ended[0]] if ended else []

    def _remark(self, line: str) -> list[Event]:
        """Show what srun says; the ranks of a host that it has lost have ended."""
        if not line.strip():
            return []
        self._last_remark = line.strip()
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
        if (lost := _LOST_NODE.match(line)) is None:
            return []
        host = lost[1].rstrip(",.")
        self.lost_hosts.append(host)
        there = [rank for rank in sorted(self._running) if rank in self._started and self._started[rank].host == host]
        self._running.difference_update(there)
        note = f"lost its host {host}"
        return [Ended(rank, 0, PeerLostError.exit_code, time.time(), note, host) for rank in there]

    def _send_waiting(self) -> None:
        # A task that is still starting has no handler yet: the signal would kill it.
        if self._srun is not None and self._running <= self._started.keys():
            for number in self._waiting_signals:
                # To a task SIGTERM is Slurm's wish for a checkpoint; SIGUSR1 ends its rank.
                self._srun.send_signal(signal.SIGUSR1 if number == signal.SIGTERM else number)
            self._waiting_signals.clear()

    def _kill(self) -> None:
        if self._srun is None:
            return
        if not self._started:
            self._srun.kill()
            return
        step = next(iter(self._started.values())).step
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(["scancel", "--signal=KILL", step], capture_output=True, timeout=30, check=False)

    def _silent_ends(self) -> list[Event]:
        now = time.time()
        ends = self._take_last_end()
        for rank in sorted(self._running):
            host = self._started[rank].host if rank in self._started else ""
            if rank not in self._started:
                note = f"could not be started: {self._last_remark or 'srun said nothing'}"
            elif self.lost_hosts:
                # Slurm ends what is left of the step.
                note = ""
            else:
                note = f"ended without a word on {host}: {self._last_remark or 'srun said nothing'}"
            ends.append(Ended(rank, 0, PeerLostError.exit_code, now, note, host))
        self._running.clear()
        return ends

    def _read(self, stream: Literal["stdout", "stderr"], pipe: IO[bytes]) -> None:
        while line := pipe.readline(1 << 16):
            self._lines.put((stream, line.decode(errors="replace").rstrip("\r\n")))

    def _wait(self, readers: Sequence[threading.Thread]) -> None:
        for reader in readers:
            reader.join()
        if self._srun is not None:
            self._srun.wait()
        self._lines.put(None)
