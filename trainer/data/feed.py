"""Rows to micro-batches: what each rank trains on at each step. numpy only; the model's device is not known here.

The global batch of a step is `global_batch_size` consecutive positions of the order, whatever the number of ranks.
Its rows are dealt out micro-batch by micro-batch over the ranks; where ranks x micro-batch size does not divide the
global batch, the slots left over are empty rows without targets, so every rank runs the same number of micro-batches
and the sum over all ranks is the same global batch. Every rank can count the supervised tokens of the whole step from
the plan, so the divisor of the loss needs no communication.

One thread of each rank assembles the next steps while the model computes. The position counts only the steps that were
handed out, so a state never runs ahead of training.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from trainer.config.deepspeed import micro_batches
from trainer.data.micro_batch import EMPTY_ROW, Assembler, BatchLayout, MicroBatch, look_up
from trainer.data.order import Order
from trainer.data.store.packing import RowPlan
from trainer.data.store.reader import TokenStore
from trainer.data.teacher import Teacher
from trainer.errors import DataError

STEPS_AHEAD = 2
FIRST_ROWS, ROWS_AT_ONCE = 256, 4096
"""Whose order, and whose places in the store, are found together: few at first, for training waits for the first step,
then twice as many each time, up to so many."""
CLOSE_SECONDS = 10.0


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
    """An endless sequence of steps for one rank. Close it: a thread works ahead.

    Args:
        store: where the tokens are.
        plan: which samples make which row.
        order: which row comes at which position.
        global_batch_size: rows of a step over all ranks.
        micro_batch_size: rows a rank processes at once.
        rank: this process, 0 to world_size - 1.
        world_size: number of ranks that share the global batch (the data-parallel size).
        quarantined: positions whose steps are left out, however many ranks there are.
        teacher: predictions for the store, to be handed out with the rows.

    Raises:
        DataError: the plan has no rows.
    """

    def __init__(
        self,
        store: TokenStore,
        plan: RowPlan,
        *,
        order: Order,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        quarantined: Collection[int] = (),
        teacher: Teacher | None = None,
    ) -> None:
        if plan.n_rows == 0:
            raise DataError(f"{store.location} has no row to train on", "see steadfast data inspect")
        if min(global_batch_size, micro_batch_size, world_size) < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}, batches {global_batch_size} and {micro_batch_size}")
        self._store = store
        self._plan = plan
        self._order = order
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._rank = rank
        self._world_size = world_size
        self._quarantined = frozenset(quarantined)
        self._teacher = teacher
        self._position = 0
        self._ahead: _Ahead | None = None

    def next_step(self) -> StepBatch:
        """The next step that is not in quarantine; moves the position to its end.

        Raises whatever went wrong while it was assembled: DataError for a damaged shard, MissingInputError for one
        that cannot be fetched, and so on.
        """
        if self._ahead is None:
            self._ahead = _Ahead(self._steps(self._position))
        batch = self._ahead.take()
        self._position = batch.position + self._global_batch_size
        return batch

    def close(self) -> None:
        """End the thread; the position stays, and the next step begins anew."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def state_dict(self) -> dict[str, int]:
        """The whole state: rows consumed by the steps handed out so far."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a saved position, with any number of ranks."""
        self.close()
        self._position = int(state["position"])

    def samples_of_step(self, batch: StepBatch) -> list[list[int]]:
        """Sample numbers of every row of the global batch, for the step ledger."""
        return [self._plan.samples_of(int(row)).tolist() for row in batch.rows]

    def _steps(self, position: int) -> Iterator[StepBatch]:
        size = self._global_batch_size
        assembler = Assembler(self._store, self._plan)
        # The order costs about as much for a thousand positions as for one, and so does looking up where rows lie. But
        # that opens their shards, and those of a store at a URL are fetched for one step after the other.
        rows_at_once = FIRST_ROWS
        while True:
            ordered = max(1, rows_at_once // size)
            rows_at_once = min(2 * rows_at_once, ROWS_AT_ONCE)
            looked_up = 1 if self._store.is_remote else ordered
            steps = self._order.rows_at(np.arange(position, position + ordered * size)).reshape(ordered, size)
            for begin in range(0, ordered, looked_up):
                some = steps[begin : begin + looked_up]
                if self._store.is_remote:
                    self._expect(position, some[0])
                dealt = np.stack([deal(rows, self._micro_batch_size, self._rank, self._world_size) for rows in some])
                layouts = iter(look_up(self._store, self._plan, dealt.reshape(-1, self._micro_batch_size)))
                for rows, mine in zip(some, dealt, strict=True):
                    micro_batches = [self._assemble(assembler, layout) for layout in islice(layouts, len(mine))]
                    if position not in self._quarantined:
                        yield self._step(position, rows, micro_batches)
                    position += size

    def _assemble(self, assembler: Assembler, layout: BatchLayout) -> MicroBatch:
        batch = assembler.assemble(layout)
        return batch if self._teacher is None else batch._replace(teacher=self._teacher.taught(batch, layout))

    def _step(self, position: int, rows: NDArray[np.int64], micro_batches: Sequence[MicroBatch]) -> StepBatch:
        return StepBatch(
            position=position,
            epoch=position // self._order.n_rows,
            rows=rows,
            supervised_tokens=int(self._plan.supervised[rows].sum()),
            tokens=int(self._plan.tokens[rows].sum()),
            micro_batches=tuple(micro_batches),
        )

    def _expect(self, position: int, rows: NDArray[np.int64]) -> None:
        """Have the shards of the whole global batch fetched, not only this rank's: one process fetches for a node."""
        plan = self._plan
        near = [
            (int(plan.document[plan.samples_of(first)[0]]), int(plan.document[plan.samples_of(last)[-1]]))
            for first, last in self._order.ranges_near(position)
        ]
        samples = np.concatenate([plan.samples_of(int(row)) for row in rows])
        self._store.expect(plan.document[samples], near)


class _Ahead:
    """Takes items from an iterator in a thread, STEPS_AHEAD before they are asked for."""

    def __init__(self, items: Iterator[StepBatch]) -> None:
        self._items = items
        self._changed = threading.Condition()
        self._ready: deque[StepBatch] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
        self._thread.start()

    def take(self) -> StepBatch:
        """The next item; an error comes where its item would have come."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error is not None)
            if not self._ready and self._error is not None:
                raise self._error
            item = self._ready.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """End the thread after the item in work; one that waits for a fetch is left behind."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            for item in self._items:
                with self._changed:
                    self._ready.append(item)
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._closed or len(self._ready) < STEPS_AHEAD)
                    if self._closed:
                        return
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()


def evaluation_batches(
    store: TokenStore, plan: RowPlan, *, micro_batch_size: int, rank: int, world_size: int, max_rows: int
) -> Iterator[MicroBatch]:
    """At most `max_rows` rows, evenly spread over the plan, dealt out over the ranks.

    Every rank gets the same number of micro-batches (collectives inside the forward pass need it); the last ones may
    hold empty rows. Over all ranks every chosen row comes exactly once.
    """
    count = min(max_rows, plan.n_rows)
    rows = np.arange(count, dtype=np.int64) * plan.n_rows // max(count, 1)
    assembler = Assembler(store, plan)
    for mine in deal(rows, micro_batch_size, rank, world_size):
        yield assembler.assemble(look_up(store, plan, mine[None])[0])


def deal(rows: NDArray[np.int64], micro_batch_size: int, rank: int, world_size: int) -> NDArray[np.int64]:
    """This rank's rows, [micro-batches, micro-batch size]; slots beyond the rows are EMPTY_ROW."""
    count = micro_batches(len(rows), micro_batch_size, world_size)
    slots = np.full((count, world_size, micro_batch_size), EMPTY_ROW, dtype=np.int64)
    slots.reshape(-1)[: len(rows)] = rows
    return slots[:, rank]
