"""Exact and near duplicates: keys and signatures of one text in the workers, clusters over columns afterwards.

Exact: xxh3_128 of the normalised text. Near: MinHash (Broder, 1997) over shingles of five words, with multiply-shift
hashing (Dietzfelbinger et al., 1997), and locality-sensitive hashing in bands (Leskovec, Rajaraman, Ullman, "Mining of
Massive Datasets", chapter 3). Pairs that share a band are compared by their whole signatures before they are joined.

A word is what stands between white space; in scripts without spaces (Han, Kana, Thai, ...) every character is a word,
so that Chinese text has shingles of five characters. Punctuation counts: 3 + 4 is not 3 - 4.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np
import xxhash
from numpy.typing import NDArray

from trainer.data.hashing import hash_runs, hash_words, mix, seeded
from trainer.data.quality.text import words_of
from trainer.errors import UsageError

PERMUTATIONS = 128
SHINGLE = 5
THRESHOLD = 0.8
RECALL_AT_THRESHOLD = 0.9  # of pairs exactly at the threshold, so many shall meet in a band
_SHINGLES_AT_ONCE = 2048  # times 128 permutations of 8 bytes: 2 MB
_ROWS_AT_ONCE = 16384
_PIVOTS = 64
_FACTORS = seeded(np.arange(PERMUTATIONS, dtype=np.uint64), 2) | np.uint64(1)
_SUMMANDS = seeded(np.arange(PERMUTATIONS, dtype=np.uint64), 3)


def normalised(text: str) -> str:
    """NFKC, without case, every run of white space one space, none at the ends; punctuation stays."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def duplicate_key(text: str) -> tuple[int, int]:
    """xxh3_128 of the normalised text as two unsigned 64-bit integers, the high one first."""
    return divmod(xxhash.xxh3_128_intdigest(normalised(text).encode()), 1 << 64)


def exact_duplicates(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The smallest row with the same key, int64 [n], for keys [n, 2] or [n]; a row that is its own is the first."""
    keys = keys[:, None] if keys.ndim == 1 else keys
    order = np.lexsort(keys.T[::-1])  # stable: rows with equal keys stay in order
    ranked = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], (ranked[1:] != ranked[:-1]).any(axis=1)])[: len(keys)])
    first = np.empty(len(keys), dtype=np.int64)
    first[order] = np.repeat(order[starts], np.diff(np.append(starts, len(keys))))
    return first


def signature(text: str) -> NDArray[np.uint32]:
    """MinHash signature of the normalised text, uint32 [128]; a text without words has all bits set."""
    words = words_of(normalised(text))
    result = np.full(PERMUTATIONS, 0xFFFFFFFF, dtype=np.uint32)
    shingles = hash_runs(hash_words(words), min(SHINGLE, len(words)))  # repeats are harmless to a minimum
    for start in range(0, len(shingles), _SHINGLES_AT_ONCE):
        part = shingles[start : start + _SHINGLES_AT_ONCE]
        permuted = part[:, None] * _FACTORS
        permuted += _SUMMANDS
        np.minimum(result, (permuted.min(axis=0) >> np.uint64(32)).astype(np.uint32), out=result)
    return result


def signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """`signature` of each text, uint32 [n, 128]."""
    result = np.empty((len(texts), PERMUTATIONS), dtype=np.uint32)
    for row, text in enumerate(texts):
        result[row] = signature(text)
    return result


def similarity(left: NDArray[np.uint32], right: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Estimated Jaccard similarity of the shingles: the share of equal entries, float64 over the leading axes."""
    share: NDArray[np.float64] = (left == right).mean(axis=-1)
    return share


@cache
def bands_for(threshold: float, permutations: int = PERMUTATIONS) -> tuple[int, int]:
    """(bands, rows of a band) for `threshold`: the longest bands in which pairs at the threshold still meet.

    A pair of similarity s meets in a band with probability 1 - (1 - s**rows)**bands; at the threshold that is at least
    `RECALL_AT_THRESHOLD`. 0.8 gives 16 bands of 8.

    Raises:
        UsageError: a threshold outside [0.2, 1].
    """
    if not 0.2 <= threshold <= 1:
        raise UsageError(f"similarity threshold {threshold}", "give 0.2 to 1; 0.8 is usual")
    for rows in range(permutations, 1, -1):
        bands = permutations // rows
        if 1 - (1 - threshold**rows) ** bands >= RECALL_AT_THRESHOLD:
            return bands, rows
    return permutations, 1


def near_duplicates(signatures: NDArray[np.uint32], threshold: float = THRESHOLD) -> NDArray[np.int64]:
    """Clusters of near duplicates: for each row the smallest row of its cluster, int64 [n].

    Args:
        signatures: uint32 [n, 128], in memory or a memory map; it is read band by band, and beside it only a few
            arrays of n entries are held.
        threshold: two rows are joined only when their estimated similarity is at least this.

    A cluster may still be a chain, every link of which is as strong as the threshold. Rows that share a band are
    compared with the first row of their bucket; those unlike it among themselves again, `_PIVOTS` times, and what is
    left then is split by the next band, so that one boilerplate bucket of a million rows does not cost its square.

    Raises:
        UsageError: a threshold outside [0.2, 1].
    """
    bands, rows = bands_for(threshold, signatures.shape[1])
    parent = np.arange(len(signatures), dtype=np.int64)
    for band in range(bands):
        keys = _band_keys(signatures, band, rows)
        members = np.arange(len(signatures), dtype=np.int64)
        for deeper in range(1, bands + 1):
            members = _link_buckets(signatures, threshold, keys, members, parent)
            if not len(members):
                break
            keys = mix(keys) ^ _band_keys(signatures, (band + deeper) % bands, rows)
        _flatten(parent)
    return parent


def _band_keys(signatures: NDArray[np.uint32], band: int, rows: int) -> NDArray[np.uint64]:
    keys = np.zeros(len(signatures), dtype=np.uint64)
    for start in range(0, len(signatures), _ROWS_AT_ONCE):
        part = signatures[start : start + _ROWS_AT_ONCE, band * rows : (band + 1) * rows]
        view = keys[start : start + _ROWS_AT_ONCE]
        for column in range(rows):
            view[:] = mix(view ^ part[:, column])
    return keys


def _link_buckets(
    signatures: NDArray[np.uint32],
    threshold: float,
    keys: NDArray[np.uint64],
    members: NDArray[np.int64],
    parent: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Join similar rows among `members` with equal keys; returns those that were like none of the pivots, in order."""
    members = members[np.argsort(keys[members], kind="stable")]
    for _ in range(_PIVOTS):
        bucket_keys = keys[members]
        new = np.concatenate([[True], bucket_keys[1:] != bucket_keys[:-1]])[: len(members)]
        starts = np.flatnonzero(new)
        pivots = np.repeat(members[starts], np.diff(np.append(starts, len(members))))
        members, pivots = members[~new], pivots[~new]
        if not len(members):
            break
        known = _roots(parent, members) == _roots(parent, pivots)
        similar = known.copy()
        similar[~known] = _similar(signatures, members[~known], pivots[~known], threshold)
        _join(parent, members[similar], pivots[similar])
        members = members[~similar]
    return np.sort(members)


def _similar(
    signatures: NDArray[np.uint32], left: NDArray[np.int64], right: NDArray[np.int64], threshold: float
) -> NDArray[np.bool_]:
    needed = threshold * signatures.shape[1]
    result = np.empty(len(left), dtype=np.bool_)
    for start in range(0, len(left), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        result[part] = np.count_nonzero(signatures[left[part]] == signatures[right[part]], axis=1) >= needed
    return result


def _roots(parent: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    while True:
        above = parent[rows]
        if np.array_equal(above, rows):
            return rows
        rows = above


def _join(parent: NDArray[np.int64], left: NDArray[np.int64], right: NDArray[np.int64]) -> None:
    """Union of many pairs at once: the larger root hangs below the smaller, until both ends of each pair agree."""
    while len(left):
        left, right = _roots(parent, left), _roots(parent, right)
        apart = left != right
        left, right = left[apart], right[apart]
        np.minimum.at(parent, np.maximum(left, right), np.minimum(left, right))


def _flatten(parent: NDArray[np.int64]) -> None:
    while not np.array_equal(above := parent[parent], parent):
        parent[:] = above
