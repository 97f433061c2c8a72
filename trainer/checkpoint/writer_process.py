"""A process beside each rank that hashes, writes and syncs its share of a checkpoint while training goes on.

The rank copies its state into memory that both share and sends one order; everything slow happens here, outside the
rank's interpreter lock. Orders and replies are JSON lines. The process is started early and afresh, never forked from
a rank that has touched a GPU; it imports no torch, and the kernel ends it with its rank.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.checkout import command_of
from trainer.checkpoint.commit import failure, publish, require_room
from trainer.checkpoint.contents import RankContents, TensorSource, numpy_dtype, write_files
from trainer.checkpoint.retention import retain
from trainer.checkpoint.verify import Manifest, manifest_text
from trainer.durable import write_errors
from trainer.errors import CannotWriteError, SteadfastError
from trainer.orphans import die_with_parent
from trainer.run_lock import check_holder

ALIGNMENT = 64
START_COMMAND = command_of("trainer.checkpoint.writer_process")
_NICENESS = 10


class SharedMemory:
    """Anonymous memory that two processes map; it has no name that a killed process could leave behind."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("steadfast-snapshot")
        self._map: mmap.mmap | None = None

    def reserve(self, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """At least `size` bytes, with real pages behind them; what was there before stays."""
        if self._map is None or len(self._map) < size:
            os.ftruncate(self.descriptor, size)
            # Page faults are what a first copy spends most of its time on: they are taken here, before training.
            self._map = mmap.mmap(self.descriptor, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        return np.frombuffer(self._map, np.uint8)

    def close(self) -> None:
        """Let go of it."""
        os.close(self.descriptor)
        self._map = None


@dataclass(frozen=True)
class Snapshot:
    """A rank's contents in shared memory, not yet ordered written."""

    contents: RankContents
    tensors: Mapping[str, list[tuple[str, str, tuple[int, ...], int]]]
    """File name to (key, dtype, shape, begin in bytes) of each tensor."""
    bytes: int


class WriterProcess:
    """The rank's end: give one order at a time, ask for its reply without waiting, or wait a while."""

    def __init__(self, command: Sequence[str] = START_COMMAND) -> None:
        self._command = command
        self._memory = SharedMemory()
        self._received = b""
        self._start()

    def reserve(self, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Make the shared memory large enough for the snapshots to come, and return it."""
        return self._memory.reserve(size)

    def copy(self, contents: RankContents) -> Snapshot:
        """Copy the tensors of `contents` to shared memory: this is what training waits for."""
        return self._copy(contents, contents.tensors, {}, 0)

    def add(self, snapshot: Snapshot, tensors: Mapping[str, Mapping[str, TensorSource]]) -> Snapshot:
        """`snapshot` with more tensor files."""
        return self._copy(snapshot.contents, tensors, snapshot.tensors, snapshot.bytes)

    def _copy(
        self,
        contents: RankContents,
        files: Mapping[str, Mapping[str, TensorSource]],
        before: Mapping[str, list[tuple[str, str, tuple[int, ...], int]]],
        position: int,
    ) -> Snapshot:
        layout: dict[str, list[tuple[str, str, tuple[int, ...], int]]] = {}
        for name, tensors in files.items():
            layout[name] = []
            for key, source in tensors.items():
                layout[name].append((key, source.dtype, source.shape, position))
                position += -(-source.bytes // ALIGNMENT) * ALIGNMENT
        memory = self._memory.reserve(max(position, ALIGNMENT))
        for name, placed in layout.items():
            for key, dtype, shape, begin in placed:
                source = files[name][key]
                source.fill(memory[begin : begin + source.bytes].view(numpy_dtype(dtype)).reshape(shape))
        return Snapshot(contents, {**before, **layout}, position)

    def write(self, attempt: Path, snapshot: Snapshot, needed: int = 0) -> None:
        """Order `snapshot` written into `attempt`. It fails when the disk has less than `needed` bytes left."""
        contents = snapshot.contents
        self._send(
            {
                "order": "write",
                "attempt": str(attempt),
                "needed": needed,
                "bytes": max(snapshot.bytes, ALIGNMENT),
                "tensors": snapshot.tensors,
                "texts": dict(contents.texts),
                "copies": {name: str(source) for name, source in contents.copies.items()},
            }
        )

    def commit(
        self,
        attempt: Path,
        target: Path,
        manifest: Manifest,
        keep: int,
        protected: Sequence[int],
        holder: Path | None = None,
    ) -> None:
        """Order `attempt` to become `target`, and older checkpoints removed; rank 0 only.

        Not when `holder` no longer names who holds the run directory (`run_lock`).
        """
        places = {"attempt": str(attempt), "target": str(target), "holder": None if holder is None else str(holder)}
        about = {"manifest": vars(manifest), "keep": keep, "protected": list(protected)}
        self._send({"order": "commit", **places, **about})

    def reply(self, wait_seconds: float = 0.0) -> dict[str, Any] | None:
        """What came of the order: its result, {fact, remedy} when it failed, None while it is being carried out."""
        deadline = time.monotonic() + wait_seconds
        while b"\n" not in self._received:
            remaining = max(0.0, deadline - time.monotonic())
            if not select.select([self._replies], [], [], remaining)[0]:
                return None
            data = os.read(self._replies, 1 << 20)
            if not data:
                return self._gone()
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End the process; what it was writing stays unfinished and is swept by the next start."""
        self._stop()
        self._memory.close()

    def _start(self) -> None:
        self._received = b""
        self._process = subprocess.Popen(
            [*self._command, str(os.getpid()), str(self._memory.descriptor)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(self._memory.descriptor,),
            bufsize=0,
        )
        if self._process.stdin is None or self._process.stdout is None:
            raise CannotWriteError("the process that writes checkpoints has no pipes", "report this")
        self._orders, self._replies = self._process.stdin, self._process.stdout.fileno()

    def _stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _send(self, order: Mapping[str, Any]) -> None:
        data = memoryview((json.dumps(order) + "\n").encode())
        if self._process.poll() is not None:
            # It died idle (out of memory, say): nothing is lost, a new one takes over.
            self._stop()
            self._start()
        with write_errors(Path(str(order["attempt"]))):
            while data:
                data = data[self._orders.write(data) :]

    def _gone(self) -> dict[str, Any]:
        code = self._process.wait()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        fact = f"the process that writes checkpoints was ended {how}"
        return failure(CannotWriteError(fact, "see whether memory ran out"))


def serve(orders: int, replies: int, memory: int, on_phase: Callable[[str], None] = lambda phase: None) -> None:
    """Carry out orders until there are no more; descriptors of the pipes and of the shared memory."""
    with open(orders, "rb") as stream:
        for line in stream:
            order = json.loads(line)
            try:
                result = _write(order, memory, on_phase) if order["order"] == "write" else _commit(order, on_phase)
            except SteadfastError as error:
                result = failure(error)
            except Exception as error:
                # The rank decides what becomes of the run; a dead writer could only be reported as dead.
                fact = f"writing failed with {type(error).__name__}: {error}"
                result = failure(CannotWriteError(fact, "report this"))
            data = memoryview((json.dumps(result) + "\n").encode())
            while data:
                data = data[os.write(replies, data) :]


def main() -> None:
    """Entry of the process: argv ends with the pid of the rank and the descriptor of the shared memory."""
    be_a_writer()


def be_a_writer(on_phase: Callable[[str], None] = lambda phase: None) -> None:
    """Tie this process to its rank and serve. Requests to stop reach the whole process group: the rank decides."""
    parent, memory = int(sys.argv[-2]), int(sys.argv[-1])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    with suppress(SteadfastError):
        die_with_parent(parent)
    with suppress(OSError):
        os.nice(_NICENESS)
    replies = os.dup(1)
    os.dup2(2, 1)
    with suppress(BrokenPipeError):
        serve(0, replies, memory, on_phase)


def _write(order: dict[str, Any], memory: int, on_phase: Callable[[str], None]) -> dict[str, Any]:
    on_phase("write")
    attempt = Path(order["attempt"])
    placed = {
        file: {key: (dtype, tuple(shape), begin) for key, dtype, shape, begin in tensors}
        for file, tensors in order["tensors"].items()
    }
    # Unmapped when the last array that looks into it is gone: at the end of this function.
    content = np.frombuffer(mmap.mmap(memory, order["bytes"], prot=mmap.PROT_READ), np.uint8)

    def read(file: str, key: str) -> np.ndarray[Any, Any]:
        dtype, shape, begin = placed[file][key]
        kind = np.dtype(numpy_dtype(dtype))
        return content[begin : begin + math.prod(shape) * kind.itemsize].view(kind)

    shapes = {file: {key: entry[:2] for key, entry in tensors.items()} for file, tensors in placed.items()}
    copies = {name: Path(source) for name, source in order["copies"].items()}
    require_room(attempt.parent, order["needed"])
    with write_errors(attempt):
        # Whoever comes first makes it.
        attempt.mkdir(exist_ok=True)
        files = write_files(attempt, shapes, read, order["texts"], copies, lambda: on_phase("middle of the file"))
    on_phase("written")
    return {"files": files}


def _commit(order: dict[str, Any], on_phase: Callable[[str], None]) -> dict[str, Any]:
    on_phase("commit")
    target = Path(order["target"])

    def guard() -> None:
        if order["holder"] is not None:
            check_holder(Path(order["holder"]))

    # Its text is made here: that takes milliseconds for a large model.
    text = manifest_text(Manifest(**order["manifest"]))
    publish(Path(order["attempt"]), target, text, on_phase, guard)
    on_phase("retain")
    retain(target.parent, order["keep"], int(target.name.rpartition("-")[2]), frozenset(order["protected"]))
    return {"committed": target.name}
