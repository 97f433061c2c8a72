"""Where a run stands, and what one step gave: plain values that travel between the rooms."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class StepResult:
    """Outcome of one optimizer step; equal on all ranks."""

    loss: float
    """Mean cross entropy over the supervised tokens of the global batch, nats."""
    gradient_norm: float
    """Global L2 norm before clipping."""
    learning_rate: float
    """Rate this step used."""
    supervised_tokens: int
    """Targets in the global batch."""
    tokens: int
    """Non-padding tokens in the global batch."""
    applied: bool
    """False when the step was skipped for a non-finite gradient."""
    stop_asked: bool
    """Some rank was asked to stop."""
    save_votes: float
    """Sum over the ranks of what their savers voted (see Saver)."""
    rank_seconds: tuple[float, ...] = ()
    """How long each rank worked on this step, waiting for other ranks left out."""


@dataclass(frozen=True)
class SaveReport:
    """What became of a checkpoint that was begun at `step`; training may be some steps further by then."""

    step: int
    path: str
    outcome: Literal["committed", "given up", "uploaded", "not uploaded"]
    problem: str | None
    """Why it was given up or not uploaded."""
    blocked_seconds: float
    """How long training stood still for it."""
    waited_seconds: float
    """Of these, how long for its end: the next save was due too early (back-pressure), or the run was ending."""
    seconds: float
    """From its beginning to its end."""


@dataclass(frozen=True)
class TrainState:
    """Progress of the run; saved in every checkpoint."""

    step: int = 0
    """Optimizer steps taken, skipped ones included."""
    tokens_seen: int = 0
    supervised_tokens_seen: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    loss_first: float | None = None
    """Loss of step 1."""
    loss_last: float | None = None
    """Loss of the newest step."""

    def after(self, result: StepResult) -> TrainState:
        """The state after one more step."""
        skipped = 0 if result.applied else 1
        return replace(
            self,
            step=self.step + 1,
            tokens_seen=self.tokens_seen + result.tokens,
            supervised_tokens_seen=self.supervised_tokens_seen + result.supervised_tokens,
            skipped_steps=self.skipped_steps + skipped,
            skipped_in_a_row=self.skipped_in_a_row + 1 if skipped else 0,
            loss_first=result.loss if self.loss_first is None else self.loss_first,
            loss_last=result.loss,
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values for state.json; a loss that is not finite becomes None, which JSON knows."""
        plain: dict[str, Any] = finite(asdict(self))
        return plain


def finite(value: Any) -> Any:
    """`value` with every number that JSON does not know (NaN, infinity) replaced by None, at any depth."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
