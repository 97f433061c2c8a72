"""A failing observer must not cost a training run."""

from __future__ import annotations

import sys
from collections.abc import Callable

from trainer.data.feed import StepBatch
from trainer.loop import Observer, StepSeconds
from trainer.state import SaveReport, StepResult, TrainState


class Guarded:
    """Passes everything on to `observer` until it fails for the first time; then says so once and stays silent."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._works = True

    def on_step(self, state: TrainState, batch: StepBatch, result: StepResult, seconds: StepSeconds) -> None:
        """See Observer."""
        self._try(lambda: self._observer.on_step(state, batch, result, seconds))

    def on_evaluate(self, state: TrainState, metrics: dict[str, float]) -> None:
        """See Observer."""
        self._try(lambda: self._observer.on_evaluate(state, metrics))

    def on_save(self, state: TrainState, report: SaveReport) -> None:
        """See Observer."""
        self._try(lambda: self._observer.on_save(state, report))

    def close(self) -> None:
        """See Observer."""
        self._try(self._observer.close)

    def _try(self, action: Callable[[], None]) -> None:
        if not self._works:
            return
        try:
            action()
        except Exception as error:
            self._works = False
            name = type(self._observer).__name__
            sys.stderr.write(f"warning: {name} failed and is switched off, training goes on: {error}\n")
