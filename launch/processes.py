"""The ranks of one host as processes: a pure plan, and the object that starts, watches and ends them.

The local launcher holds one `HostRanks`; the Ray launcher holds one on every node. Both read the same events.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from launch.contract import LAUNCHER_PID, rank_environment
from trainer.errors import CannotWriteError, MissingInputError
from trainer.world import World

_LONGEST_LINE = 1 << 16
_QUEUED_EVENTS = 10_000
# A child of a rank may hold the rank's output open; its last words are not worth more waiting than this.
_OUTPUT_PATIENCE_SECONDS = 2.0
# A killed process with a lot of memory, or one stuck in a driver, takes a while to go.
_KILL_PATIENCE_SECONDS = 5.0


@dataclass(frozen=True)
class RankProcess:
    """What to start for one rank: a command, its whole environment and its working directory."""

    rank: int
    command: list[str]
    environment: dict[str, str]
    directory: str


@dataclass(frozen=True)
class Output:
    """One line that a rank wrote, without its end."""

    rank: int
    stream: Literal["stdout", "stderr"]
    line: str


@dataclass(frozen=True)
class Ended:
    """A rank ended: `status` is its exit code, or minus the number of the signal that killed it.

    `when` is seconds since the epoch on the rank's host: what orders deaths on different hosts. `note` says more when
    the process itself could not be seen to end (its host is lost). `host` is its host, empty for this one.
    """

    rank: int
    pid: int
    status: int
    when: float
    note: str = ""
    host: str = ""


Event = Output | Ended


def plan_ranks(
    command: Sequence[str],
    *,
    ranks: int,
    first_rank: int = 0,
    world_size: int,
    master_address: str,
    master_port: int,
    environ: Mapping[str, str],
    launcher_pid: int,
    cores: int,
    directory: str,
) -> list[RankProcess]:
    """Plan `ranks` processes of one host; the first of them is global rank `first_rank`. Pure."""
    shared = {
        **environ,
        "PYTHONUNBUFFERED": "1",
        LAUNCHER_PID: str(launcher_pid),
        # Without it every rank starts a thread for every core, and they fight.
        "OMP_NUM_THREADS": environ.get("OMP_NUM_THREADS") or str(max(1, cores // ranks)),
    }
    worlds = [
        World(first_rank + local_rank, world_size, local_rank, ranks, master_address, master_port)
        for local_rank in range(ranks)
    ]
    return [RankProcess(world.rank, [*command], shared | rank_environment(world), directory) for world in worlds]


def free_port(address: str) -> int:
    """A TCP port that nobody listens on at `address` right now."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class HostRanks:
    """Started ranks of this host.

    `start` must be called from a thread that lives as long as the ranks: the kernel ends a rank when the *thread*
    that started it ends. Every rank leads its own process group, so that its children end with it and Ctrl-C in a
    terminal reaches only the launcher.
    """

    def __init__(self, plan: Sequence[RankProcess], *, inherit_stdout_of: int | None = None) -> None:
        self._plan = list(plan)
        self._inherit_stdout_of = inherit_stdout_of
        self._events: queue.Queue[Event] = queue.Queue(_QUEUED_EVENTS)
        self._alive: dict[int, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._janitor: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start every rank, with SIGUSR2 blocked until the rank asks for it (`launch.signals`)."""
        self._janitor = _start_janitor()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        try:
            for rank_process in self._plan:
                self._start(rank_process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def next_events(self, timeout: float) -> list[Event]:
        """What happened since the last call; waits at most `timeout` seconds for the first event."""
        try:
            events = [self._events.get(timeout=timeout)]
        except queue.Empty:
            return []
        while len(events) < _QUEUED_EVENTS:
            try:
                events.append(self._events.get_nowait())
            except queue.Empty:
                break
        return events

    def signal(self, number: int) -> None:
        """Send a signal to every living rank; SIGKILL goes to its children too."""
        with self._lock:
            for process in self._alive.values():
                with contextlib.suppress(ProcessLookupError):
                    if number == signal.SIGKILL:
                        os.killpg(process.pid, number)
                    else:
                        os.kill(process.pid, number)

    def close(self) -> None:
        """Kill whatever still lives, and wait for it to be gone (a moment; memory and ports are free then)."""
        self.signal(signal.SIGKILL)
        end = time.monotonic() + _KILL_PATIENCE_SECONDS
        while self._alive and time.monotonic() < end:
            self.next_events(0.05)
        if self._janitor is not None and self._janitor.stdin is not None:
            with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
                self._janitor.stdin.close()
                self._janitor.wait(1.0)

    def _tell_janitor(self, change: str, group: int) -> None:
        """Call it with the lock held: lines of two threads must not mix."""
        if self._janitor is not None and self._janitor.stdin is not None:
            # It may have been killed; the ranks matter more.
            with contextlib.suppress(BrokenPipeError, ValueError):
                self._janitor.stdin.write(f"{change}{group}\n".encode())

    def _start(self, rank_process: RankProcess) -> None:
        inherits = rank_process.rank == self._inherit_stdout_of
        try:
            process = subprocess.Popen(
                rank_process.command,
                env=rank_process.environment,
                cwd=rank_process.directory,
                stdin=subprocess.DEVNULL,
                stdout=None if inherits else subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise MissingInputError(
                f"cannot start rank {rank_process.rank}: there is no {error.filename}",
                "the checkout and its Python must lie at the same path on every node",
            ) from error
        except OSError as error:
            raise CannotWriteError(
                f"cannot start rank {rank_process.rank}: {error}", "check limits (ulimit -u)"
            ) from error
        with self._lock:
            self._alive[rank_process.rank] = process
            self._tell_janitor("+", process.pid)
        readers = []
        for name, pipe in (("stdout", process.stdout), ("stderr", process.stderr)):
            if pipe is not None:
                reader = threading.Thread(target=self._read, args=(rank_process.rank, name, pipe), daemon=True)
                reader.start()
                readers.append(reader)
        threading.Thread(target=self._wait, args=(rank_process.rank, process, readers), daemon=True).start()

    def _read(self, rank: int, stream: Literal["stdout", "stderr"], pipe: IO[bytes]) -> None:
        while line := pipe.readline(_LONGEST_LINE):
            self._events.put(Output(rank, stream, line.decode(errors="replace").rstrip("\r\n")))

    def _wait(self, rank: int, process: subprocess.Popen[bytes], readers: list[threading.Thread]) -> None:
        if hasattr(os, "waitid"):
            # WNOWAIT leaves a zombie, which keeps the process id, and with it the group's, from being given to
            # anybody else until the rank's children are gone too.
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        else:
            process.wait()
        when = time.time()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        for reader in readers:
            reader.join(_OUTPUT_PATIENCE_SECONDS)
        with self._lock:
            # Before the process id is free for anybody else.
            self._tell_janitor("-", process.pid)
            status = process.wait()
            del self._alive[rank]
        self._events.put(Ended(rank, process.pid, status, when))


def _start_janitor() -> subprocess.Popen[bytes]:
    """A process that outlives us for a moment and kills the groups of our ranks (`launch.janitor`)."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(__file__).with_name("janitor.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        bufsize=0,
    )
