"""How far a build is, on stderr: a bar with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trainer.data.build.run import Progress

SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def shown_progress() -> Iterator[Callable[[Progress], None]]:
    """A function to call after every chunk; what it shows is gone, or finished, when the block ends."""
    if not sys.stderr.isatty():
        yield _Lines().show
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("encoding", total=None)
        yield lambda progress: bar.update(
            task, completed=progress.bytes, total=progress.total, description=f"{progress.rows:,} rows"
        )


class _Lines:
    """Plain lines for logs, at most one in half a minute."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()

    def show(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_LINES or not progress.bytes:
            return
        self._last = now
        left = (now - self._started) * (progress.total - progress.bytes) / progress.bytes
        share = progress.bytes / max(progress.total, 1)
        sys.stderr.write(f"{progress.rows:,} rows, {share:.0%} of the input, about {left / 60:.1f} minutes left\n")
