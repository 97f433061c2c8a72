"""JSON Lines files that are only appended to, and cut back to the resumed step when a run continues."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.durable import write_errors, write_file


class JsonLines:
    """Append JSON objects to `path`, one a line. `durable` forces each line to disk."""

    def __init__(self, path: Path, *, durable: bool = False) -> None:
        self.path = path
        self._durable = durable
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("a", encoding="utf-8")

    def append(self, entry: dict[str, Any]) -> None:
        """Write one entry; numbers that JSON does not know (NaN, infinity) become null."""
        with write_errors(self.path):
            self._stream.write(json.dumps(_finite(entry), ensure_ascii=False) + "\n")
            self._stream.flush()
            if self._durable:
                os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Entries of a ledger; a last line torn by a crash is left out."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                yield entry


def cut_back(path: Path, step: int) -> dict[str, Any] | None:
    """Drop all entries after `step`, so that a resumed run does not write them twice; returns the last one kept."""
    kept = [entry for entry in read_lines(path) if entry.get("step", 0) <= step]
    if path.is_file():
        write_file(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept))
    return kept[-1] if kept else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
