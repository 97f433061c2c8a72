"""Which source comes at which position: a mixture whose weights change at given positions (a curriculum).

The rows of a run are cut into segments of constant weights. Shares are whole multiples of 2**-20. Every 1,024
positions of a segment have a quota for each source: the whole part of its share, and now and then one more, such that
1,024 such blocks together give every source exactly its share. The sources inside a block are permuted, and the index
in a source is how often it came before, so every source runs through its own order without gap or repeat, whatever the
other sources do. Any position is found in O(1): what lies before its block follows from the quotas.

The extra draws are systematic sampling (Madow, 1949): the fractions of all sources lie end to end on a line, and block
b takes those sources whose piece holds a point of a comb that each block moves to another place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from trainer.data.order import Order, derived_keys, permute
from trainer.errors import UsageError

BLOCK = 1024
_CYCLE = 1024
_WHOLE = BLOCK * _CYCLE
# Where the comb lies in each block of a cycle: the bits of the number of the block reversed (van der Corput), which
# spreads the draws of a small piece as evenly over the cycle as those of a large one.
_COMB = np.array([int(f"{block:010b}"[::-1], 2) for block in range(_CYCLE)])


class Segment:
    """Positions 0, 1, 2, ... of constant shares.

    Args:
        weights: one non-negative number a source; only their ratios count.
        rows: how many positions; None: without end.
        key: key of the permutations.

    `drawn_before` and `source_and_index` speak of positions inside the segment.
    """

    def __init__(self, weights: Sequence[float], rows: int | None, key: int) -> None:
        self.rows = rows
        self._key = key
        self.shares = _shares(weights)
        whole, fraction = np.divmod(self.shares, _CYCLE)
        pieces = np.concatenate([[0], np.cumsum(fraction)])
        # Points of the comb {point + 1024 j} below each end of a piece, [blocks, sources + 1].
        below = -((_COMB[:, None] - pieces[None]) // _CYCLE)
        self._quotas = whole[None] + below[:, 1:] - below[:, :-1]
        self._before = np.concatenate([np.zeros((1, len(weights)), np.int64), np.cumsum(self._quotas, axis=0)])
        self._full_blocks = None if rows is None else rows // BLOCK
        rest = 0 if rows is None else rows % BLOCK
        self._last_quotas = _apportion(self.shares, rest)

    def drawn_before(self, position: int) -> NDArray[np.int64]:
        """How often each source comes before a position, int64 [sources]."""
        block, rest = divmod(position, BLOCK)
        drawn: NDArray[np.int64] = self._before_blocks(np.array([block]))[0]
        if rest:
            source, _ = self.source_and_index(np.arange(block * BLOCK, position))
            drawn = drawn + np.bincount(source, minlength=len(self.shares))
        return drawn

    def source_and_index(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source at each position and how often it came in the segment before, both int64 [n]."""
        blocks, inside = np.divmod(positions, BLOCK)
        source, index = np.empty_like(inside), np.empty_like(inside)
        for block in np.unique(blocks).tolist():
            chosen = blocks == block
            sources, indexes = self._block(block)
            source[chosen], index[chosen] = sources[inside[chosen]], indexes[inside[chosen]]
        return source, index

    def _block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The same for all positions of one block."""
        # The last, shorter block of a segment has quotas of its own.
        quotas = self._last_quotas if block == self._full_blocks else self._quotas[block % _CYCLE]
        size = int(quotas.sum())
        keys = np.full(size, derived_keys(self._key, np.array([block]))[0])
        source = np.repeat(np.arange(len(quotas)), quotas)[permute(np.arange(size), size, keys)]
        order = np.argsort(source, kind="stable")
        first = self._before_blocks(np.array([block]))[0] - (np.cumsum(quotas) - quotas)
        index = np.empty_like(source)
        index[order] = np.arange(size) + np.repeat(first, quotas)
        return source, index

    def _before_blocks(self, block: NDArray[np.int64]) -> NDArray[np.int64]:
        cycle, inside = np.divmod(block, _CYCLE)
        before: NDArray[np.int64] = cycle[:, None] * self.shares[None] + self._before[inside]
        return before


@dataclass(frozen=True)
class MixedOrder:
    """Rows of several sources, each in its own order, mixed by segments. Made by `mixed_order`."""

    orders: Sequence[Order | None]
    """Each source's own rows, from 0; None for a source without rows."""
    first_rows: NDArray[np.int64]
    """Where the rows of each source begin among all rows, int64 [sources]."""
    segments: Sequence[Segment]
    begins: NDArray[np.int64]
    """First position of each segment."""
    drawn: NDArray[np.int64]
    """Draws of each source before each segment, int64 [segments, sources]."""

    @property
    def n_rows(self) -> int:
        """Rows of all sources: what a report calls an epoch."""
        return sum(order.n_rows for order in self.orders if order is not None)

    def rows_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Order`. Raises ValueError for a negative position."""
        source, index = self.source_and_index(positions)
        rows = np.empty_like(source)
        for number in np.unique(source).tolist():
            order = self.orders[number]
            if order is None:
                raise ValueError(f"source {number} has no rows")
            chosen = source == number
            rows[chosen] = order.rows_at(index[chosen]) + self.first_rows[number]
        return rows

    def source_and_index(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source at each position and how often it came before, both int64 of the shape of `positions`."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and int(positions.min()) < 0:
            raise ValueError("no row at a negative position")
        flat = positions.ravel()
        segment = np.searchsorted(self.begins, flat, side="right") - 1
        source, index = np.empty_like(flat), np.empty_like(flat)
        for number in np.unique(segment).tolist():
            chosen = segment == number
            source[chosen], index[chosen] = self.segments[number].source_and_index(flat[chosen] - self.begins[number])
            index[chosen] += self.drawn[number, source[chosen]]
        return source.reshape(positions.shape), index.reshape(positions.shape)

    def drawn_before(self, position: int) -> NDArray[np.int64]:
        """How often each source comes before a position, int64 [sources]."""
        number = int(np.searchsorted(self.begins, position, side="right")) - 1
        found: NDArray[np.int64] = self.drawn[number] + self.segments[number].drawn_before(
            position - int(self.begins[number])
        )
        return found

    def ranges_near(self, position: int) -> list[tuple[int, int]]:
        """Those of every source that is drawn now."""
        number = int(np.searchsorted(self.begins, position, side="right")) - 1
        found = []
        for order, first, drawn, share in zip(
            self.orders,
            self.first_rows.tolist(),
            self.drawn_before(position).tolist(),
            self.segments[number].shares.tolist(),
            strict=True,
        ):
            if order is not None and share:
                found += [(first + low, first + high) for low, high in order.ranges_near(drawn)]
        return found


def mixed_order(
    orders: Sequence[Order | None],
    first_rows: NDArray[np.int64],
    segments: Sequence[tuple[int | None, Sequence[float]]],
    seed: int,
) -> MixedOrder:
    """Mix sources by segments.

    Args:
        orders: the order of each source's rows, from 0; None for a source without rows.
        first_rows: where the rows of each source begin among all rows, int64 [sources].
        segments: (rows, weights, one a source) in turn; the last has rows None.
        seed: key of where each source comes.

    Raises:
        UsageError: a segment without a positive weight, or with one below a millionth of the whole.
    """
    keys = derived_keys(seed, np.arange(len(segments))).tolist()
    made = [Segment(weights, rows, key) for (rows, weights), key in zip(segments, keys, strict=True)]
    begins, drawn = [0], [np.zeros(len(orders), dtype=np.int64)]
    for segment in made[:-1]:
        rows = segment.rows or 0
        begins.append(begins[-1] + rows)
        drawn.append(drawn[-1] + segment.drawn_before(rows))
    return MixedOrder(orders, first_rows, made, np.array(begins, dtype=np.int64), np.stack(drawn))


def weights_of(segment: Mapping[str, float], names: Sequence[str], place: str) -> list[float]:
    """Weights in the order of the sources `names`; a source that is not mentioned has none.

    Raises UsageError for a name that no source has; `place` is the configuration key the message names.
    """
    unknown = sorted(set(segment) - set(names))
    if unknown:
        raise UsageError(f"{place}: the store has no source {unknown[0]!r}", f"its sources: {', '.join(names)}")
    return [float(segment.get(name, 0.0)) for name in names]


def _shares(weights: Sequence[float]) -> NDArray[np.int64]:
    """Weights as whole numbers that add up to 2**20, by largest remainder."""
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact, Fraction(0))
    if total <= 0:
        raise UsageError("a mixture without a positive weight draws nothing", "give a source of data.mixture a weight")
    found = _largest_remainder([weight / total * _WHOLE for weight in exact], _WHOLE)
    for weight, share in zip(exact, found, strict=True):
        if weight > 0 and share == 0:
            raise UsageError(
                f"a weight of data.mixture is less than a millionth of the whole ({float(weight / total):.1e})",
                "give it a larger weight, or leave the source out",
            )
    return np.array(found, dtype=np.int64)


def _apportion(shares: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    exact = [Fraction(int(share) * rows, _WHOLE) for share in shares]
    return np.array(_largest_remainder(exact, rows), dtype=np.int64)


def _largest_remainder(exact: Sequence[Fraction], total: int) -> list[int]:
    """Whole numbers near `exact` that add up to `total` (Hamilton's method); of equal remainders the first wins."""
    found = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: (found[index] - exact[index], index))
    for index in by_remainder[: total - sum(found)]:
        found[index] += 1
    return found
