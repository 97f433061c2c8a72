"""A real file system that is small: a tmpfs. Needs root, and a kernel that lets root mount."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class NoSmallDisk(Exception):
    """Why there is none here."""


@contextmanager
def small_disk(place: Path, kibibytes: int) -> Iterator[Path]:
    """Mount a tmpfs of that size at `place` (made) for the block; NoSmallDisk says why that cannot be."""
    place.mkdir(parents=True)
    try:
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(place)], capture_output=True, text=True
        )
    except FileNotFoundError as error:
        raise NoSmallDisk("there is no mount command") from error
    if made.returncode:
        raise NoSmallDisk(made.stderr.strip() or f"mount ended with {made.returncode}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path, leave_kibibytes: int) -> Path:
    """A file that takes all room but about `leave_kibibytes`."""
    import shutil

    ballast = place / "ballast"
    ballast.write_bytes(b"\0" * max(0, shutil.disk_usage(place).free - (leave_kibibytes << 10)))
    return ballast
