"""Progress for people: one live line on a terminal, plain lines everywhere else."""

from __future__ import annotations

import math
import sys
import time


class PlainProgress:
    """A line for every logged step: what batch logs and files get."""

    def __init__(self, step: int, max_steps: int) -> None:
        self._max_steps = max_steps
        self._start_step = step
        self._started = time.monotonic()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Print the line."""
        print(self.line(step, metrics), flush=True)

    def line(self, step: int, metrics: dict[str, float]) -> str:
        """The text of the line."""
        head = f"step {step:>{len(str(self._max_steps))}}/{self._max_steps}"
        if "checkpoint/save_seconds" in metrics:
            waited = metrics["checkpoint/waited_seconds"]
            return (
                f"{head}  checkpoint of step {metrics['checkpoint/step']:.0f} committed after "
                f"{metrics['checkpoint/save_seconds']:.2f} s, training stood still for "
                f"{metrics['checkpoint/blocked_seconds']:.2f} s"
                + (f", {waited:.2f} s of it waiting for the end" if waited else "")
            )
        if "train/loss" not in metrics:
            return f"{head}  " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        remaining = (time.monotonic() - self._started) / max(1, step - self._start_step) * (self._max_steps - step)
        return (
            f"{head}  loss {metrics['train/loss']:.4f}  gradient norm {metrics['train/grad_norm']:.3f}  "
            f"learning rate {metrics['train/learning_rate']:.2e}  "
            f"{metrics['throughput/tokens_per_second']:,.0f} tokens/s  left {_clock(remaining)}"
        )

    def close(self) -> None:
        """Nothing is held."""


class LiveProgress:
    """One line that is rewritten in place; evaluations and saves scroll above it."""

    def __init__(self, step: int, max_steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._plain = PlainProgress(step, max_steps)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task("", total=max_steps, completed=step)
        self._progress.start()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Update the line."""
        if "train/loss" not in metrics:
            self._progress.console.print(self._plain.line(step, metrics), highlight=False)
            return
        text = f"loss {metrics['train/loss']:.4f}  {metrics['throughput/tokens_per_second']:,.0f} tokens/s"
        self._progress.update(self._task, completed=step, description=text)

    def close(self) -> None:
        """Leave the line as it stands."""
        self._progress.stop()


def progress_for_stdout(step: int, max_steps: int) -> PlainProgress | LiveProgress:
    """The progress that suits where stdout goes."""
    return LiveProgress(step, max_steps) if sys.stdout.isatty() else PlainProgress(step, max_steps)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
