"""JSON Lines files that are only appended to, and cut back to the resumed step when a run continues."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from trainer.durable import write_errors
from trainer.state import finite


class JsonLines:
    """Append JSON objects to `path`, one a line. `durable` forces each line to disk."""

    def __init__(self, path: Path, *, durable: bool = False) -> None:
        self.path = path
        self._durable = durable
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            torn = _is_torn(path)
            self._stream = path.open("a", encoding="utf-8")
            if torn:
                # Else the next entry would be glued to the half one of a process that was killed, and lost with it.
                self._stream.write("\n")

    def append(self, entry: dict[str, Any]) -> None:
        """Write one entry; numbers that JSON does not know (NaN, infinity) become null."""
        with write_errors(self.path):
            self._stream.write(json.dumps(finite(entry), ensure_ascii=False) + "\n")
            self._stream.flush()
            if self._durable:
                os.fsync(self._stream.fileno())

    def sync(self) -> None:
        """Force what was written to disk."""
        with write_errors(self.path):
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


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
