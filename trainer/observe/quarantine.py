"""Steps whose rows are left out from now on: run.dir/quarantine.json.

A step is known by its position (rows consumed before it), which does not depend on the number of ranks, so a resumed
run leaves out the same rows on any number of them. The file is a list; a line taken out by hand is trained on again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.durable import write_file
from trainer.errors import DataError

FILE = "quarantine.json"


def quarantined_positions(run_dir: Path) -> list[int]:
    """Positions of the steps in quarantine. Rank 0 reads them for all; DataError when the file is damaged."""
    return [int(entry["position"]) for entry in _read(run_dir)]


def put_into_quarantine(run_dir: Path, steps: Sequence[dict[str, Any]]) -> None:
    """Add steps, each {step, position, rows, gradient_norm}. Rank 0 calls it."""
    known = _read(run_dir)
    positions = {entry["position"] for entry in known}
    merged = [*known, *(entry for entry in steps if entry["position"] not in positions)]
    lines = ",\n".join(json.dumps(entry) for entry in sorted(merged, key=lambda entry: int(entry["position"])))
    write_file(run_dir / FILE, f"[\n{lines}\n]\n")


def _read(run_dir: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
        if not all(isinstance(entry["position"], int) for entry in entries):
            raise ValueError("a position is no whole number")
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{run_dir / FILE} is no list of steps: {error}", "correct it or remove it") from error
    return list(entries)
