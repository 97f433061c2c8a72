"""Which revision of this code runs, for provenance."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 10.0


@cache
def code_revision() -> str | None:
    """The commit of this checkout, with `-dirty` when tracked files were changed; None where git does not know it."""
    if not (ROOT / ".git").exists():
        return None  # git would name the repository around us
    words = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
