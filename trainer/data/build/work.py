"""The working directory of a build: finished parts outlive a kill, and the same build continues from them.

It lies beside the store as `.STORE.work`. A build that succeeds removes it; one that fails or is killed leaves the
parts that are finished. Parts are reused only by a build with the same recipe, tokenizer and version; a part's name
holds the hash of the rows it was made from, so changed input is encoded again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from trainer.durable import write_errors, write_file
from trainer.locks import take_lock

IDENTITY = "identity.json"
WORTH_KEEPING = 2
"""Parts. A single one is made again in seconds, and a small build that failed should leave nothing behind."""


class Work:
    """A locked working directory.

    Args:
        out: the store that is built.
        identity: all that the content of a part depends on besides its input.

    Raises:
        RunLockedError: another build of the same store is running.
        CannotWriteError: the directory cannot be made.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self.path = out.parent / f".{out.name}.work"
        self.parts = self.path / "parts"
        self.spool = self.path / "inputs"
        with write_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock: IO[str] = take_lock(self.path / "lock", f"the build of {out}", "wait for it, or stop it")
        try:
            self._prepare(json.dumps(identity, sort_keys=True, ensure_ascii=False))
        except BaseException:
            self.leave()
            raise

    def finished(self) -> set[str]:
        """Names of the parts that are complete."""
        return {part.name for part in self.parts.iterdir() if not part.name.startswith(".")}

    def _prepare(self, identity: str) -> None:
        """Make the directories, without parts of another build."""
        written = self.path / IDENTITY
        with write_errors(self.path):
            if not written.is_file() or written.read_text(encoding="utf-8") != identity:
                shutil.rmtree(self.parts, ignore_errors=True)
                write_file(written, identity)
            self.parts.mkdir(exist_ok=True)
            self.spool.mkdir(exist_ok=True)
            for half in self.parts.glob(".*.writing"):
                half.unlink()

    def forget_parts(self) -> None:
        """Remove all parts."""
        for part in self.parts.iterdir():
            part.unlink()

    def keep_only(self, names: Sequence[str]) -> None:
        """Remove the parts of input that has changed since."""
        for name in self.finished() - set(names):
            (self.parts / name).unlink()

    def remove(self) -> None:
        """The build is done: remove the directory."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()

    def leave(self) -> int:
        """The build failed: keep finished parts for the next one if they are worth it; returns how many were kept."""
        kept = len(self.finished()) if self.parts.is_dir() else 0
        if kept < WORTH_KEEPING:
            self.remove()
            return 0
        self._lock.close()
        return kept
