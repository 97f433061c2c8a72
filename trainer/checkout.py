"""Where this code lies, which revision it is, and how processes of ours find it wherever the user stands."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_GIT_SECONDS = 10.0


def command_of(module: str) -> tuple[str, ...]:
    """What starts a fresh interpreter that calls `main` of a module of this code; arguments may follow."""
    return (sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); from {module} import main; main()")


@cache
def code_revision() -> str | None:
    """The commit of this checkout, with `-dirty` when tracked files were changed; None where git does not know it."""
    if not (ROOT / ".git").exists():
        return None  # git would name the repository around us
    words = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=_GIT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
