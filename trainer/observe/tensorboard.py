"""TensorBoard event files; the only module that names tensorboard."""

from __future__ import annotations

from pathlib import Path


class TensorBoard:
    """Scalars under the metric names. Events after `step` of an earlier start are hidden, so curves never double."""

    def __init__(self, path: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(path), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Add one point to each curve."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()
