"""The order of data as a pure function of (seed, position): no table, no state, nothing that depends on ranks.

Position p lies in epoch p // n; within an epoch the rows are permuted by a keyed Feistel network over Z_a x Z_b with
a*b >= n (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002: generalised Feistel and cycle walking).
Since a*b exceeds n by less than sqrt(n) + 1, walking is rarely needed. Any position is found in O(1), so a run
resumes anywhere at once, and any number of ranks sees the same sequence.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def rows_at(positions: NDArray[np.int64], n_rows: int, seed: int) -> NDArray[np.int64]:
    """Rows at global `positions` (int64, any shape, >= 0): every epoch of `n_rows` positions holds each row once.

    Raises:
        ValueError: `n_rows` < 1 or a negative position.
    """
    positions = np.asarray(positions, dtype=np.int64)
    if n_rows < 1 or (positions.size and int(positions.min()) < 0):
        raise ValueError(f"no row at a negative position or in an empty plan ({n_rows} rows)")
    epochs, inside = np.divmod(positions.ravel(), n_rows)
    left_size = math.isqrt(n_rows - 1) + 1
    right_size = -(-n_rows // left_size)
    # One key per element: positions may straddle epochs.
    keys = _mix(_mix(np.full(inside.shape, seed % (1 << 64), dtype=np.uint64)) ^ epochs.astype(np.uint64))
    rows = _feistel(inside, left_size, right_size, keys)
    while (outside := np.flatnonzero(rows >= n_rows)).size:
        rows[outside] = _feistel(rows[outside], left_size, right_size, keys[outside])
    return rows.reshape(positions.shape)


def _feistel(values: NDArray[np.int64], left_size: int, right_size: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """A permutation of range(left_size * right_size) for every key."""
    left, right = (part.astype(np.uint64) for part in np.divmod(values, right_size))
    for round_number in range(0, ROUNDS, 2):
        left = (left + _hash(right, keys, round_number) % np.uint64(left_size)) % np.uint64(left_size)
        right = (right + _hash(left, keys, round_number + 1) % np.uint64(right_size)) % np.uint64(right_size)
    return (left * np.uint64(right_size) + right).astype(np.int64)


def _hash(half: NDArray[np.uint64], keys: NDArray[np.uint64], round_number: int) -> NDArray[np.uint64]:
    return _mix(_mix(keys + np.uint64(round_number)) ^ half)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's step and finaliser (Steele, Lea and Flood, 2014), arithmetic modulo 2**64."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    return values ^ (values >> np.uint64(31))
