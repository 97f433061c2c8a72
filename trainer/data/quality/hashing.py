"""Hashes over columns: how a decision about a document depends on its own key and a seed, and on nothing else."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's step and finaliser (Steele, Lea and Flood, 2014): a bijection of uint64, arithmetic mod 2**64."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    return values ^ (values >> np.uint64(31))


def seeded(values: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """`mix` under a seed (any integer, taken mod 2**64): other seeds give unrelated orders."""
    key = mix(np.array([seed % (1 << 64)], dtype=np.uint64))
    return mix(values.astype(np.uint64, copy=False) ^ key)
