"""Decontamination: does a training text repeat a text of the evaluation set?

Overlap of 13 words (Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C), of 20 characters where
words are not separated by spaces (Han, Kana, Thai, ...). Words are compared without case and punctuation. An evaluation
text that is shorter is looked for as a whole; one of fewer than five words or eight characters is everywhere by chance
and is not looked for, but counted.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.hashing import hash_runs, hash_words
from trainer.data.quality.text import UNSPACED_CHARACTER, words_of

WORDS, CHARACTERS = 13, 20
MIN_WORDS, MIN_CHARACTERS = 5, 8
_PUNCTUATION = re.compile(r"[^\w\s]|_")


@dataclass(frozen=True)
class EvalIndex:
    """Hashed n-grams of evaluation texts.

    `hashes` uint64, sorted, each once; `lengths` the numbers of words they were made of; `texts` how many evaluation
    texts are in it, `too_short` how many are not.
    """

    hashes: NDArray[np.uint64]
    lengths: tuple[int, ...]
    texts: int
    too_short: int


def build_index(texts: Iterable[str]) -> EvalIndex:
    """The index of some evaluation texts; give question and answer as one text where both together count."""
    parts, lengths, indexed, too_short = [np.empty(0, dtype=np.uint64)], set[int](), 0, 0
    for text in texts:
        words = _words(text)
        unspaced = 2 * sum(map(bool, map(UNSPACED_CHARACTER.match, words))) > len(words)
        if len(words) < (MIN_CHARACTERS if unspaced else MIN_WORDS):
            too_short += 1
            continue
        width = min(len(words), CHARACTERS if unspaced else WORDS)
        parts.append(hash_runs(hash_words(words), width))
        lengths.add(width)
        indexed += 1
    return EvalIndex(np.unique(np.concatenate(parts)), tuple(sorted(lengths)), indexed, too_short)


def contamination(text: str, index: EvalIndex) -> float:
    """Share of the words of `text` that stand in a run which is also in the evaluation texts; 0.0 is clean."""
    if not len(index.hashes):
        return 0.0
    hashes = hash_words(_words(text))
    covered = np.zeros(len(hashes) + 1, dtype=np.int64)  # +1 where a run begins, -1 behind its end
    for width in index.lengths:
        runs = hash_runs(hashes, width)
        at = np.searchsorted(index.hashes, runs)
        found = np.flatnonzero(index.hashes[np.minimum(at, len(index.hashes) - 1)] == runs)
        np.add.at(covered, found, 1)
        np.add.at(covered, found + width, -1)
    return float(np.count_nonzero(np.cumsum(covered)[:-1]) / max(len(hashes), 1))


def _words(text: str) -> list[str]:
    return words_of(_PUNCTUATION.sub(" ", unicodedata.normalize("NFKC", text).casefold()))
