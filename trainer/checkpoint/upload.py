"""Committed checkpoints, copied to object storage in a process of its own.

URL/step-00000100/...            files first
URL/step-00000100/MANIFEST.json  last: with it the copy is complete, without it nobody reads it
URL/latest                       after that: names the newest complete copy, never one that is not

An object store has no rename; the order of writing stands for it. Each object's size is compared after it was written.
Nothing waits for this process but the end of the run, and a local checkpoint stays until its copy is complete.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.checkout import command_of
from trainer.checkpoint.verify import MANIFEST_NAME, read_manifest, verify_files
from trainer.errors import SteadfastError
from trainer.orphans import die_with_parent
from trainer.remote import ATTEMPTS, Destination, open_destination
from trainer.state import SaveReport

LATEST = "latest"
SETTING = "checkpoint.upload"
_START_COMMAND = command_of("trainer.checkpoint.upload")


def upload_checkpoint(
    path: Path, filesystem: Any, root: str, pause: Callable[[float], None] = time.sleep, attempts: int = ATTEMPTS
) -> None:
    """Copy the checkpoint `path` to `root` of an fsspec file system; a complete equal copy is left as it is.

    Every operation is tried `attempts` times with growing pauses. Raises CannotWriteError when one of them keeps
    failing; what is there then is not a checkpoint to any reader. CheckpointError when the local one is damaged.
    """
    there = Destination(filesystem, root, "the local checkpoint stays; the next start tries again", pause, attempts)
    manifest = read_manifest(path)
    verify_files(path, manifest)
    place = f"{path.name}/{MANIFEST_NAME}"
    text = (path / MANIFEST_NAME).read_bytes()
    found = there.content(place)
    if found != text:
        if found is not None:
            # Another checkpoint of this step: it ends to be one before its files change.
            there.remove(place)
        for name in [*manifest.files, MANIFEST_NAME]:
            there.put(path / name, f"{path.name}/{name}")
    there.put_text(LATEST, f"{path.name}\n".encode())


class Uploads:
    """Rank 0's end of the process: checkpoints are added, one after the other is copied, reports are collected."""

    def __init__(self, url: str) -> None:
        self.url = url
        open_destination(url, SETTING)
        self._process = subprocess.Popen(
            [*_START_COMMAND, str(os.getpid()), url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self._pending: dict[int, tuple[Path, float]] = {}
        self._received = b""

    @property
    def pending(self) -> list[int]:
        """Steps whose local checkpoint must stay, because it is being copied."""
        return list(self._pending)

    def add(self, path: Path) -> None:
        """Have a committed checkpoint copied; a dead process is reported by `reports`."""
        self._pending[int(path.name.rpartition("-")[2])] = (path, time.monotonic())
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.write(f"{json.dumps(str(path))}\n".encode())

    def reports(self, wait_seconds: float = 0.0) -> list[SaveReport]:
        """What became of copies since the last call; waits at most so long for one."""
        if self._process.stdout is None or not self._pending:
            return []
        if not select.select([self._process.stdout], [], [], wait_seconds)[0]:
            return []
        data = os.read(self._process.stdout.fileno(), 1 << 16)
        if not data:
            return [self._report(step, "the process that uploads checkpoints is gone") for step in self.pending]
        *lines, self._received = (self._received + data).split(b"\n")
        return [self._report(found["step"], found["problem"]) for found in map(json.loads, lines)]

    def finish(self) -> list[SaveReport]:
        """Wait until everything was copied or given up."""
        reports: list[SaveReport] = []
        while self._pending:
            reports += self.reports(wait_seconds=1.0)
        return reports

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _report(self, step: int, problem: str | None) -> SaveReport:
        path, began = self._pending.pop(step)
        if problem is not None:
            sys.stderr.write(f"warning: the checkpoint of step {step} was not uploaded to {self.url}: {problem}\n")
        return SaveReport(
            step=step,
            path=str(path),
            outcome="uploaded" if problem is None else "not uploaded",
            problem=problem,
            blocked_seconds=0.0,
            waited_seconds=0.0,
            seconds=time.monotonic() - began,
        )


def main() -> None:
    """Entry of the process: argv ends with the pid of the rank and the URL; paths come in, JSON lines go out."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    with suppress(SteadfastError):
        die_with_parent(int(sys.argv[-2]))
    replies = os.dup(1)
    os.dup2(2, 1)
    filesystem, root = open_destination(sys.argv[-1], SETTING)
    for line in sys.stdin:
        path = Path(json.loads(line))
        problem = None
        try:
            upload_checkpoint(path, filesystem, root)
        except SteadfastError as error:
            problem = error.fact
        except OSError as error:
            problem = str(error)
        step = int(path.name.rpartition("-")[2])
        os.write(replies, f"{json.dumps({'step': step, 'problem': problem})}\n".encode())
