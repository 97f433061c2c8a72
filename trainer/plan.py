"""Configuration x world -> the numbers a run will have. Pure; no torch, no files."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from trainer.config.deepspeed import accumulation_steps
from trainer.config.schema import Config


@dataclass(frozen=True)
class Plan:
    """Numbers that follow from the configuration, the number of ranks and the store."""

    world_size: int
    global_batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    """Micro-batches a rank processes in one optimizer step."""
    empty_rows_per_step: int
    """Slots of a step that hold no row, because ranks x micro-batch does not divide the global batch."""
    sequence_length: int
    tokens_per_step: int
    """Positions in a global batch, padding included."""
    rows: int
    """Rows of the training store under this plan."""
    max_steps: int
    epochs: float
    """Times the whole store is seen."""
    source_epochs: dict[str, float]
    """Times each source of a mixture is seen; empty without a mixture."""

    def as_json(self) -> dict[str, Any]:
        """Plain values for plan.json."""
        return asdict(self)


def make_plan(
    config: Config,
    *,
    world_size: int,
    rows: int,
    sequence_length: int,
    source_epochs: dict[str, float] | None = None,
) -> Plan:
    """The plan of a run over `rows` rows of `sequence_length` tokens."""
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    accumulation = accumulation_steps(config, world_size)
    return Plan(
        world_size=world_size,
        global_batch_size=batch,
        micro_batch_size=micro,
        accumulation_steps=accumulation,
        empty_rows_per_step=accumulation * world_size * micro - batch,
        sequence_length=sequence_length,
        tokens_per_step=batch * sequence_length,
        rows=rows,
        max_steps=config.train.max_steps,
        epochs=config.train.max_steps * batch / rows,
        source_epochs=source_epochs or {},
    )
