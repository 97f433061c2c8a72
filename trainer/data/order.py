"""The order of data as a pure function of (seed, position): no table, no state, nothing that depends on ranks.

Position p lies in epoch p // n. A permutation of a range is a keyed Feistel network over Z_a x Z_b with a*b >= n (Black
and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002: generalised Feistel and cycle walking). Since a*b exceeds n
by less than sqrt(n) + 1, walking is rarely needed. Any position is found in O(1), so a run resumes anywhere at once,
and any number of ranks sees the same sequence.

Two orders are made of it. `GlobalOrder` permutes all rows. `BlockOrder` permutes blocks of neighbouring rows, and the
rows inside a shuffle window of some blocks: reading then stays within a few token shards for a while, which is what a
store that is fetched over a network needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.data.hashing import mix, seeded

ROUNDS = 8
# Different permutations under one seed and epoch need different keys.
_BLOCKS, _INSIDE, _OFFSET = np.uint64(1), np.uint64(2), np.uint64(3)

Keys = NDArray[np.uint64]


class Order(Protocol):
    """Which row comes at which position."""

    @property
    def n_rows(self) -> int:
        """Positions of one epoch."""

    def rows_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows at `positions` (int64, any shape, >= 0)."""

    def ranges_near(self, position: int) -> list[tuple[int, int]]:
        """Row ranges [first, last] that hold the rows of this and the next shuffle window, nearest first.

        Only a hint for fetching ahead; empty when rows come from anywhere.
        """


@dataclass(frozen=True)
class GlobalOrder:
    """Every epoch is a permutation of all rows."""

    n_rows: int
    seed: int

    def rows_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `rows_at`."""
        return rows_at(positions, self.n_rows, self.seed)

    def ranges_near(self, position: int) -> list[tuple[int, int]]:
        """Rows come from anywhere."""
        return []


@dataclass(frozen=True)
class BlockOrder:
    """Every epoch is a permutation of all rows that stays within `window_blocks` blocks of `block_rows` rows for long.

    The rows lie on a ring that each epoch cuts at another place into full blocks and a remainder of less than a block,
    so the remainder, which comes last and is shuffled with the last window, is not always the same rows. The blocks are
    permuted; each `window_blocks` of them in turn are a shuffle window, whose rows are permuted.
    """

    n_rows: int
    seed: int
    block_rows: int
    window_blocks: int

    def __post_init__(self) -> None:
        if min(self.n_rows, self.block_rows, self.window_blocks) < 1:
            raise ValueError(f"no order of {self.n_rows} rows in {self.window_blocks} blocks of {self.block_rows}")

    @property
    def _blocks(self) -> int:
        return self.n_rows // self._block

    @property
    def _block(self) -> int:
        return min(self.block_rows, self.n_rows)

    def rows_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Order`. Raises ValueError for a negative position."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, inside = _epochs(positions.ravel(), self.n_rows)
        keys = derived_keys(self.seed, epochs)
        size = self._block * self.window_blocks
        # The remainder belongs to the last window that has a full block.
        window = np.minimum(inside // size, (self._blocks - 1) // self.window_blocks)
        within = inside - window * size
        last = window == (self._blocks - 1) // self.window_blocks
        shuffled = np.empty_like(within)
        inside_keys = mix(mix(keys ^ _INSIDE) ^ window.astype(np.uint64))
        for chosen, length in ((~last, size), (last, self._last_window_rows)):
            shuffled[chosen] = permute(within[chosen], length, inside_keys[chosen])
        slot, offset = np.divmod(shuffled, self._block)
        slot += window * self.window_blocks
        full = slot < self._blocks
        block = slot.copy()
        block[full] = permute(slot[full], self._blocks, mix(keys[full] ^ _BLOCKS))
        rows: NDArray[np.int64] = (block * self._block + offset + self._ring_offset(keys)) % self.n_rows
        return rows.reshape(positions.shape)

    def ranges_near(self, position: int) -> list[tuple[int, int]]:
        """The blocks of this and the next window."""
        found: list[tuple[int, int]] = []
        epoch, inside = divmod(position, self.n_rows)
        windows = (self._blocks - 1) // self.window_blocks + 1
        window = min(inside // (self._block * self.window_blocks), windows - 1)
        for number in (epoch * windows + window, epoch * windows + window + 1):
            keys = derived_keys(self.seed, np.array([number // windows]))
            first = number % windows * self.window_blocks
            slots = np.arange(first, min(first + self.window_blocks, self._blocks))
            blocks = permute(slots, self._blocks, np.repeat(mix(keys ^ _BLOCKS), len(slots)))
            begins = blocks * self._block
            ends = begins + self._block - 1
            if number % windows == windows - 1 and self.n_rows % self._block:
                begins, ends = np.append(begins, self._blocks * self._block), np.append(ends, self.n_rows - 1)
            offset = int(self._ring_offset(keys)[0])
            for begin, end in zip((begins + offset) % self.n_rows, (ends + offset) % self.n_rows, strict=True):
                # A block may lie across the seam of the ring.
                whole = [(begin, end)] if begin <= end else [(begin, self.n_rows - 1), (0, end)]
                found += [(int(low), int(high)) for low, high in whole]
        return found

    @property
    def _last_window_rows(self) -> int:
        before = (self._blocks - 1) // self.window_blocks * self.window_blocks
        return self.n_rows - before * self._block

    def _ring_offset(self, keys: Keys) -> NDArray[np.int64]:
        return (mix(keys ^ _OFFSET) % np.uint64(self.n_rows)).astype(np.int64)


def rows_at(positions: NDArray[np.int64], n_rows: int, seed: int) -> NDArray[np.int64]:
    """Rows at global `positions` (int64, any shape, >= 0): every epoch of `n_rows` positions holds each row once.

    Raises:
        ValueError: `n_rows` < 1 or a negative position.
    """
    positions = np.asarray(positions, dtype=np.int64)
    epochs, inside = _epochs(positions.ravel(), n_rows)
    return permute(inside, n_rows, derived_keys(seed, epochs)).reshape(positions.shape)


def permute(values: NDArray[np.int64], size: int, keys: Keys) -> NDArray[np.int64]:
    """A permutation of range(size) for every key, applied to `values`, each under its own key (both [n])."""
    left_size = math.isqrt(size - 1) + 1
    right_size = -(-size // left_size)
    found = _feistel(values, left_size, right_size, keys)
    while (outside := np.flatnonzero(found >= size)).size:
        found[outside] = _feistel(found[outside], left_size, right_size, keys[outside])
    return found


def derived_keys(seed: int, numbers: NDArray[np.int64]) -> Keys:
    """One key for each of `numbers` (int64 [n]; for orders the epochs: positions may straddle them), uint64 [n]."""
    return seeded(numbers.astype(np.uint64), seed)


def _epochs(positions: NDArray[np.int64], n_rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if n_rows < 1 or (positions.size and int(positions.min()) < 0):
        raise ValueError(f"no row at a negative position or in an empty plan ({n_rows} rows)")
    epochs, inside = np.divmod(positions, n_rows)
    return epochs, inside


def _feistel(values: NDArray[np.int64], left_size: int, right_size: int, keys: Keys) -> NDArray[np.int64]:
    """A permutation of range(left_size * right_size) for every key."""
    left, right = (part.astype(np.uint64) for part in np.divmod(values, right_size))
    for round_number in range(0, ROUNDS, 2):
        left = (left + _hash(right, keys, round_number) % np.uint64(left_size)) % np.uint64(left_size)
        right = (right + _hash(left, keys, round_number + 1) % np.uint64(right_size)) % np.uint64(right_size)
    return (left * np.uint64(right_size) + right).astype(np.int64)


def _hash(half: NDArray[np.uint64], keys: Keys, round_number: int) -> NDArray[np.uint64]:
    return mix(mix(keys + np.uint64(round_number)) ^ half)
