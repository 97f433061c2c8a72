"""Files in run.dir/.preflight: what shows that run.dir is shared, and speaks for ranks that cannot reach rank 0.

Rank 0 writes a nonce, every rank its facts. A rank that meets rank 0 is told the nonce and looks for it here; a rank
that does not has at least left its facts, which name its host. What an earlier start left behind is told apart by the
nonce, and facts by their age on the clock of the file server, the only clock that all hosts share.
"""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from launch.preflight.reports import Nonce, RankFacts
from trainer.durable import write_errors, write_file

# Facts written longer before the nonce than this belong to an earlier start.
_OLDEST_SECONDS = 60.0
# A file server may show a new file late.
_LATE_SECONDS = 5.0


class Mailbox:
    """The directory `.preflight` in a run directory; every rank has one."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self.path = run_dir / ".preflight"

    def write(self, facts: RankFacts) -> None:
        """Leave this rank's facts; CannotWriteError when run.dir cannot be written."""
        self._make()
        write_file(self._report(facts.rank), facts.model_dump_json())

    def write_nonce(self, nonce: str) -> None:
        """Rank 0 begins; CannotWriteError when run.dir cannot be written."""
        self._make()
        write_file(self._nonce, nonce)

    def look_for(self, nonce: str, within: float = _LATE_SECONDS) -> Nonce:
        """Whether the nonce of rank 0 is here; waits for a late file server, not longer than `within` seconds."""
        end = time.monotonic() + within
        while True:
            found = self._read_nonce()
            if found == nonce:
                return "seen"
            if time.monotonic() > end:
                return "missing" if found is None else "stale"
            time.sleep(0.1)

    def reports(self, ranks: set[int]) -> dict[int, RankFacts]:
        """What those of `ranks` have left here that have started about when rank 0 did."""
        found = {}
        with suppress(OSError):
            youngest = self._nonce.stat().st_mtime
            for rank in ranks:
                with suppress(OSError, ValidationError):
                    report = self._report(rank)
                    if report.stat().st_mtime > youngest - _OLDEST_SECONDS:
                        found[rank] = RankFacts.model_validate_json(report.read_bytes())
        return found

    def remove(self) -> None:
        """Leave no trace; rank 0 calls it last."""
        was_ours = self._ours.exists()
        shutil.rmtree(self.path, ignore_errors=True)
        if was_ours:
            # Only when it is empty.
            with suppress(OSError):
                self._run_dir.rmdir()

    def _make(self) -> None:
        with write_errors(self.path):
            is_new = True
            try:
                self._run_dir.mkdir(parents=True)
            except FileExistsError:
                is_new = False
            self.path.mkdir(exist_ok=True)
            if is_new:
                self._ours.touch()

    def _read_nonce(self) -> str | None:
        try:
            return self._nonce.read_text()
        except OSError:
            return None

    @property
    def _ours(self) -> Path:
        """Says that run.dir was not there before the preflight."""
        return self.path / "made-run-dir"

    @property
    def _nonce(self) -> Path:
        return self.path / "nonce"

    def _report(self, rank: int) -> Path:
        return self.path / f"rank-{rank:05d}.json"
