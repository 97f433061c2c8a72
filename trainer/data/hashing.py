"""Hashes of words and of columns: a decision about a document depends on its own key and a seed, on nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import xxhash
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


def hash_words(words: Sequence[str]) -> NDArray[np.uint64]:
    """xxh3_64 of each word, uint64 [words]."""
    return np.fromiter(map(xxhash.xxh3_64_intdigest, map(str.encode, words)), dtype=np.uint64, count=len(words))


def hash_runs(words: NDArray[np.uint64], width: int) -> NDArray[np.uint64]:
    """Hash of each run of `width` words (hashes), uint64 [words - width + 1]; none when there are fewer words.

    Runs of different widths and the same words in another order have unrelated hashes.
    """
    count = max(len(words) - width + 1, 0) if width else 0
    total = np.full(count, width, dtype=np.uint64)
    for place, weight in enumerate(_run_weights(width) if count else ()):
        total += words[place : place + count] * weight
    return mix(total)


@cache
def _run_weights(width: int) -> NDArray[np.uint64]:
    return seeded(np.arange(width, dtype=np.uint64), 1) | np.uint64(1)
