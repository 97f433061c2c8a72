"""JSON Lines files that are only appended to, and cut back to the resumed step when a run continues."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from trainer.durable import write_errors
from trainer.errors import CannotWriteError
from trainer.state import finite

MAX_KEPT_BYTES = 16 << 20
"""Lines that are kept in memory while the disk is full."""


class JsonLines:
    """Append JSON objects to `path`, one a line. `durable` forces each line to disk.

    A full disk is no reason to stop: lines are kept in memory, said once on stderr, and written when there is room.
    """

    def __init__(self, path: Path, *, durable: bool = False) -> None:
        self.path = path
        self._durable = durable
        self._complained = False
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Else the next entry would be glued to the half one of a process that was killed, and lost with it.
            self._kept = bytearray(b"\n" if _is_torn(path) else b"")
            self._stream = path.open("ab", buffering=0)

    def append(self, entry: dict[str, Any]) -> None:
        """Write one entry; numbers that JSON does not know (NaN, infinity) become null."""
        self._kept += (_as_text(entry) + "\n").encode()
        self._write()
        if self._durable and not self._kept:
            with write_errors(self.path):
                os.fsync(self._stream.fileno())

    def sync(self) -> None:
        """Force what was written to disk."""
        self._write()
        with write_errors(self.path):
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._write()
        if self._kept:
            sys.stderr.write(f"warning: {self.path} lacks its last lines: the disk stayed full\n")
        self._stream.close()

    def _write(self) -> None:
        """As much as the disk takes; a line that is torn now is completed by the next call."""
        try:
            while self._kept:
                del self._kept[: self._stream.write(self._kept)]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                with write_errors(self.path):
                    raise
            if len(self._kept) > MAX_KEPT_BYTES:
                raise CannotWriteError(f"no space left while writing {self.path}", "free disk space") from error
            if not self._complained:
                self._complained = True
                sys.stderr.write(f"warning: no space left for {self.path}: its lines are kept until there is some\n")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Entries of a ledger; a last line torn by a crash is left out."""
    if path.is_file():
        with path.open("rb") as stream:
            for line in stream:
                entry = _parsed(line)
                if entry is not None:
                    yield entry


def cut_back(path: Path, step: int) -> dict[str, Any] | None:
    """Drop all entries after `step`, so that a resumed run does not write them twice; returns the last one kept.

    Entries are in the order of their steps: only those that are dropped are parsed, and the rest stays as it is.
    """
    if not path.is_file():
        return None
    with write_errors(path), path.open("rb+") as stream:
        ends = list(accumulate(len(line) for line in stream))
        for begin, end in zip(reversed([0, *ends[:-1]]), reversed(ends), strict=True):
            stream.seek(begin)
            entry = _parsed(stream.read(end - begin))
            if entry is not None and entry.get("step", 0) <= step:
                stream.truncate(end)
                return entry
        stream.truncate(0)
    return None


def _as_text(entry: dict[str, Any]) -> str:
    try:
        return json.dumps(entry, ensure_ascii=False, allow_nan=False)
    except ValueError:
        # Looking at every number is slower than writing them.
        return json.dumps(finite(entry), ensure_ascii=False)


def _is_torn(path: Path) -> bool:
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) != b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and line.endswith(b"\n") else None
