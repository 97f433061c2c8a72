"""The train loop.

    restore or begin
    while steps are left:
        fetch all micro-batches of the step and count their supervised tokens
        forward and backward each; step
        observe
        hear which saves have ended
        evaluate, when due              (before saving: the checkpoint knows the result)
        stop, when all ranks agree      (before saving: the last checkpoint is the stopping point)
        begin to save, when due         (it is written while training goes on)
        save and wait, when last or stopping

Every branch depends on values that are equal on all ranks, so the ranks never part ways.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from trainer import collectives
from trainer.data.feed import Feed, StepBatch
from trainer.engine.protocol import Engine
from trainer.errors import DivergedError
from trainer.state import SaveReport, StepResult, TrainState


class Observer(Protocol):
    """Watches a run; lives on rank 0 and never changes training."""

    def on_step(self, state: TrainState, batch: StepBatch, result: StepResult, seconds: StepSeconds) -> None:
        """After every optimizer step."""

    def on_evaluate(self, state: TrainState, metrics: dict[str, float]) -> None:
        """After every evaluation."""

    def on_save(self, state: TrainState, report: SaveReport) -> None:
        """After a save ended, well or not; `state` is where training is by then."""

    def close(self) -> None:
        """At the end, whatever the reason."""


OnPhase = Callable[[str, int], None]
"""Called as each phase of a step begins, with the step in work: the watchdog and drills hang here."""


class Saver(Protocol):
    """Saves checkpoints; every rank has one and calls it in step with the others."""

    @property
    def vote(self) -> float:
        """This rank's share of the sum that `settle` gets."""

    def settle(self, votes: float) -> list[SaveReport]:
        """At a step boundary: which saves have ended."""

    def wait(self) -> list[SaveReport]:
        """Wait until no save is under way."""

    def begin(self, state: TrainState, metrics: dict[str, float]) -> list[SaveReport]:
        """Start saving; `metrics` are those of an evaluation at this very step."""

    def finish(self, state: TrainState, metrics: dict[str, float]) -> list[SaveReport]:
        """Save and wait until it is committed."""


class StopFlag(Protocol):
    """Set from outside (a signal) when this rank is asked to stop."""

    @property
    def requested(self) -> str | None:
        """Why, or None."""


@dataclass(frozen=True)
class StepSeconds:
    """Wall time of one step."""

    total: float
    data_wait: float


@dataclass(frozen=True)
class OwnTime:
    """When a rank began a step, and its place among the ranks."""

    began: float = 0.0
    blocked_before: float = 0.0
    rank: int = 0
    ranks: int = 1

    def of_all_ranks(self) -> list[float]:
        """This rank's part of the sum that tells how long each rank worked: its own time so far, zero for others."""
        times = [0.0] * self.ranks
        blocked = collectives.blocked_seconds() - self.blocked_before
        times[self.rank] = time.monotonic() - self.began - blocked
        return times


@dataclass(frozen=True)
class Loop:
    """What the loop works on."""

    engine: Engine
    feed: Feed
    max_steps: int
    max_skipped_steps: int
    evaluate_every: int
    save_due: Callable[[int], bool]
    """Whether a step is to be saved; asked for every step by all ranks alike, it may communicate."""
    evaluate: Callable[[TrainState], dict[str, float]] | None
    saver: Saver
    observers: Sequence[Observer]
    stop: StopFlag
    on_phase: OnPhase = lambda phase, step: None
    rank: int = 0
    world_size: int = 1
    on_skip: Callable[[TrainState, StepBatch, StepResult], None] = lambda state, batch, result: None
    """Called on all ranks after a step that was not applied."""


def fit(loop: Loop, state: TrainState) -> tuple[TrainState, bool]:
    """Train from `state` to the last step; returns the final state and whether the run was stopped before its end.

    Raises DivergedError after too many skipped steps in a row. All ranks call it together.
    """
    stopping = False
    while state.step < loop.max_steps and not stopping:
        started = time.monotonic()
        blocked = collectives.blocked_seconds()
        step = state.step + 1
        loop.on_phase("data", step)
        batch = loop.feed.next_step()
        waited = time.monotonic() - started
        own = OwnTime(started, blocked, loop.rank, loop.world_size)
        result = train_step(loop.engine, batch, loop.stop, loop.saver.vote, partial(_at, loop.on_phase, step), own)
        state = state.after(result)
        loop.on_phase("observe", step)
        if not result.applied:
            loop.on_skip(state, batch, result)
        seconds = StepSeconds(time.monotonic() - started, waited)
        for observer in loop.observers:
            observer.on_step(state, batch, result, seconds)
        _tell(loop, state, loop.saver.settle(result.save_votes))
        if state.skipped_in_a_row >= loop.max_skipped_steps:
            # A save under way is of weights that were good.
            _tell(loop, state, loop.saver.wait())
            raise DivergedError(
                f"{state.skipped_in_a_row} steps in a row had a non-finite gradient, the last was step {state.step}",
                "lower optimizer.learning_rate, look at the rows of these steps in bad-steps/, or set "
                "train.on_divergence=rewind to leave them out",
            )
        last = state.step == loop.max_steps
        stopping = result.stop_asked and not last
        metrics: dict[str, float] = {}
        if loop.evaluate is not None and (last or state.step % loop.evaluate_every == 0):
            metrics = loop.evaluate(state)
            for observer in loop.observers:
                observer.on_evaluate(state, metrics)
        due = loop.save_due(state.step)
        if due or last or stopping:
            loop.on_phase("save", state.step)
            save = loop.saver.finish if last or stopping else loop.saver.begin
            _tell(loop, state, save(state, metrics))
    loop.on_phase("end", state.step)
    return state, stopping


def _tell(loop: Loop, state: TrainState, reports: Sequence[SaveReport]) -> None:
    for report in reports:
        for observer in loop.observers:
            observer.on_save(state, report)


def _at(on_phase: OnPhase, step: int, phase: str) -> None:
    on_phase(phase, step)


def train_step(
    engine: Engine,
    batch: StepBatch,
    stop: StopFlag,
    save_vote: float,
    begins: Callable[[str], None] = lambda phase: None,
    own: OwnTime | None = None,
) -> StepResult:
    """One optimizer step over the global batch. All ranks call it with their share of the same batch.

    The divisor is the number of supervised tokens of the whole step, known before the first forward, so any split into
    ranks and micro-batches gives the same gradient. `begins` is called as each part of the step begins.
    """
    learning_rate = engine.learning_rate
    losses = []
    for micro_batch in batch.micro_batches:
        begins("forward")
        loss = engine.summed_loss(micro_batch)
        begins("backward")
        engine.backward(loss, batch.supervised_tokens)
        losses.append(loss.detach())
    begins("step")
    gradient_norm, applied = engine.step()
    # Read back only now: asking for a number earlier would make a GPU wait between micro-batches.
    summed = float(torch.stack(losses).double().sum())
    begins("agree")
    times = own.of_all_ranks() if own is not None else []
    asks = [summed, 1.0 if stop.requested else 0.0, save_vote]
    total, asked, votes, *rank_seconds = collectives.add_up([*asks, *times])
    return StepResult(
        loss=total / batch.supervised_tokens,
        gradient_norm=gradient_norm,
        learning_rate=learning_rate,
        supervised_tokens=batch.supervised_tokens,
        tokens=batch.tokens,
        applied=applied,
        stop_asked=asked > 0,
        rank_seconds=tuple(rank_seconds),
        save_votes=votes,
    )
