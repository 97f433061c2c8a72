"""Rows to micro-batches: what each rank trains on at each step. numpy only; the model's device is not known here.

The global batch of a step is `global_batch_size` consecutive positions of the order, whatever the number of ranks.
Its rows are dealt out micro-batch by micro-batch over the ranks; where ranks x micro-batch size does not divide the
global batch, the slots left over are empty rows without targets, so every rank runs the same number of micro-batches
and the sum over all ranks is the same global batch. Every rank can count the supervised tokens of the whole step from
the plan, so the divisor of the loss needs no communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.config.deepspeed import micro_batches
from trainer.data.order import rows_at
from trainer.data.packing import RowPlan
from trainer.data.reader import TokenStore
from trainer.errors import DataError

# The target of a position that predicts nothing; torch's losses ignore it by default.
IGNORED = -100
LENGTH_MULTIPLE = 16
EMPTY_ROW = -1


@dataclass(frozen=True)
class MicroBatch:
    """One rank's rows of one micro-batch; three int64 arrays [micro_batch, length].

    `targets[i, t]` is the id that position t must predict (already shifted), or IGNORED. A target never crosses the
    border of a sample. `position_ids` restart at 0 with every sample, and in the padded tail, which is a segment of its
    own.
    """

    input_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    position_ids: NDArray[np.int64]


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step: global facts, the same on every rank, and this rank's micro-batches.

    `position` is the number of rows consumed before this step, `epoch` that of its first row, `rows` int64
    [global batch] its rows in order, `supervised_tokens` and `tokens` (padding excluded) are sums over all ranks.
    """

    position: int
    epoch: int
    rows: NDArray[np.int64]
    supervised_tokens: int
    tokens: int
    micro_batches: tuple[MicroBatch, ...]


class Feed:
    """An endless sequence of steps for one rank.

    Args:
        store: where the tokens are.
        plan: which samples make which row.
        seed: key of the order.
        global_batch_size: rows of a step over all ranks.
        micro_batch_size: rows a rank processes at once.
        rank: this process, 0 to world_size - 1.
        world_size: number of ranks that share the global batch (the data-parallel size).

    Raises:
        DataError: the plan has no rows.
    """

    def __init__(
        self,
        store: TokenStore,
        plan: RowPlan,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        if plan.n_rows == 0:
            raise DataError(f"{store.path} has no row to train on", "see steadfast data inspect")
        if min(global_batch_size, micro_batch_size, world_size) < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}, batches {global_batch_size} and {micro_batch_size}")
        self._store = store
        self._plan = plan
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._rank = rank
        self._world_size = world_size
        self._position = 0

    def next_step(self) -> StepBatch:
        """The next step; moves the position by one global batch."""
        position, plan = self._position, self._plan
        rows = rows_at(np.arange(position, position + self._global_batch_size), plan.n_rows, self._seed)
        batch = StepBatch(
            position=position,
            epoch=position // plan.n_rows,
            rows=rows,
            supervised_tokens=int(plan.supervised[rows].sum()),
            tokens=int(plan.tokens[rows].sum()),
            micro_batches=tuple(self._micro_batches(rows)),
        )
        self._position += self._global_batch_size
        return batch

    def state_dict(self) -> dict[str, int]:
        """The whole state: rows consumed by the steps handed out so far."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a saved position, with any number of ranks."""
        self._position = int(state["position"])

    def samples_of_step(self, batch: StepBatch) -> list[list[int]]:
        """Sample numbers of every row of the global batch, for the step ledger."""
        return [self._plan.samples_of(int(row)).tolist() for row in batch.rows]

    def _micro_batches(self, rows: NDArray[np.int64]) -> Iterator[MicroBatch]:
        for mine in _deal(rows, self._micro_batch_size, self._rank, self._world_size):
            yield make_micro_batch(self._store, self._plan, mine)


def evaluation_batches(
    store: TokenStore, plan: RowPlan, *, micro_batch_size: int, rank: int, world_size: int, max_rows: int
) -> Iterator[MicroBatch]:
    """At most `max_rows` rows, evenly spread over the plan, dealt out over the ranks.

    Every rank gets the same number of micro-batches (collectives inside the forward pass need it); the last ones may
    hold empty rows. Over all ranks every chosen row comes exactly once.
    """
    count = min(max_rows, plan.n_rows)
    rows = np.arange(count, dtype=np.int64) * plan.n_rows // max(count, 1)
    for mine in _deal(rows, micro_batch_size, rank, world_size):
        yield make_micro_batch(store, plan, mine)


def _deal(rows: NDArray[np.int64], micro_batch_size: int, rank: int, world_size: int) -> Iterator[NDArray[np.int64]]:
    """This rank's rows, micro-batch by micro-batch; slots beyond the rows are EMPTY_ROW."""
    count = micro_batches(len(rows), micro_batch_size, world_size)
    slots = np.full((count, world_size, micro_batch_size), EMPTY_ROW, dtype=np.int64)
    slots.reshape(-1)[: len(rows)] = rows
    yield from slots[:, rank]


def make_micro_batch(store: TokenStore, plan: RowPlan, rows: Sequence[int] | NDArray[np.int64]) -> MicroBatch:
    """Assemble rows (EMPTY_ROW for an empty one).

    Packed rows have the plan's sequence length. Unpacked rows are padded to the longest of them, rounded up to a
    multiple of 16 and never beyond the sequence length.
    """
    length = plan.sequence_length
    if not plan.packing:
        longest = max((int(plan.tokens[row]) for row in rows if row != EMPTY_ROW), default=1)
        length = min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, length)
    shape = (len(rows), length)
    input_ids = np.full(shape, store.padding_id, dtype=np.int64)
    targets = np.full(shape, IGNORED, dtype=np.int64)
    position_ids = np.empty(shape, dtype=np.int64)
    for index, row in enumerate(rows):
        at = 0
        for sample in plan.samples_of(int(row)) if row != EMPTY_ROW else ():
            at += _write_sample(
                store, plan, int(sample), input_ids[index, at:], targets[index, at:], position_ids[index, at:]
            )
        position_ids[index, at:] = np.arange(length - at)
    return MicroBatch(input_ids, targets, position_ids)


def _write_sample(
    store: TokenStore,
    plan: RowPlan,
    sample: int,
    input_ids: NDArray[np.int64],
    targets: NDArray[np.int64],
    position_ids: NDArray[np.int64],
) -> int:
    """Write one sample at the beginning of the given views; returns its length."""
    start, stop = int(plan.start[sample]), int(plan.stop[sample])
    first = int(plan.first_target[sample])
    ids, spans = store.document(int(plan.document[sample]))
    size = stop - start
    input_ids[:size] = ids[start:stop]
    position_ids[:size] = np.arange(size)
    # Spans are sorted: begin with the first that ends after `first`.
    for begin, end in spans[int(np.searchsorted(spans[:, 1], first, side="right")) :].tolist():
        if begin >= stop:
            break
        low, high = max(begin, first), min(end, stop)
        # Document position t is predicted from position t - 1.
        targets[low - 1 - start : high - 1 - start] = ids[low:high]
    return size
