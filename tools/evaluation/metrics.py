"""Scores as sums: what each row adds, and how the sum over any rows becomes the score.

So one bootstrap serves all of them, and a slice is a selection of rows. Exact match and F1 are ours; BLEU and chrF are
sacrebleu's, ROUGE-L is rouge-score's, with words split where the script has no spaces (the extra `eval`).
"""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Sums = NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """One score of one model: `parts` is [rows, parts]; `score` makes [...] of sums [..., parts]."""

    name: str
    parts: Sums
    score: Callable[[Sums], Sums]
    percent: bool = True
    """Whether it is shown as a percentage."""
    higher_is_better: bool = True

    def value(self, rows: NDArray[np.bool_] | slice = slice(None)) -> float:
        """The score over the selected rows."""
        return float(self.score(self.parts[rows].sum(axis=0)))


def has_extra() -> bool:
    """Whether the extra `eval` is installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("sacrebleu", "rouge_score"))


def of_answers(answers: Sequence[str], expected: Sequence[str]) -> list[Metric]:
    """The metrics of generated answers against their references."""
    pairs = list(zip(answers, expected, strict=True))
    found = [
        _mean("exact match", [float(answer == reference) for answer, reference in pairs]),
        _mean("token F1", [token_f1(answer, reference) for answer, reference in pairs]),
    ]
    return [*found, _bleu(pairs), _chrf(pairs), _rouge(pairs)] if has_extra() else found


def of_losses(losses: NDArray[np.float64], utf8_bytes: NDArray[np.int64]) -> list[Metric]:
    """The metrics of held-out text: `losses` is [documents, 2], summed loss and tokens."""
    parts = np.column_stack([losses, utf8_bytes.astype(np.float64)])
    return [
        Metric("loss", parts, lambda sums: sums[..., 0] / sums[..., 1], percent=False, higher_is_better=False),
        Metric(
            "perplexity", parts, lambda sums: np.exp(sums[..., 0] / sums[..., 1]), percent=False, higher_is_better=False
        ),
        Metric(
            "bits per byte",
            parts,
            lambda sums: sums[..., 0] / math.log(2) / np.maximum(sums[..., 2], 1.0),
            percent=False,
            higher_is_better=False,
        ),
    ]


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the reference's words, in lower case and without punctuation.

    As SQuAD counts (arXiv:1606.05250), but articles count, and where a script has no spaces each character is a word.
    """
    found, wanted = Counter(_words(answer)), Counter(_words(reference))
    if not found or not wanted:
        return float(found == wanted)
    common = (found & wanted).total()
    return 2 * common / (found.total() + wanted.total())


def _words(text: str) -> list[str]:
    from trainer.data.quality.text import words_of

    kept = "".join(letter if letter.isalnum() or letter.isspace() else " " for letter in text.lower())
    return [word for word in words_of(kept) if not word.isspace()]


def _mean(name: str, values: Sequence[float]) -> Metric:
    return Metric(name, np.array([[value, 1.0] for value in values]), lambda sums: sums[..., 0] / sums[..., 1])


def _bleu(pairs: Sequence[tuple[str, str]]) -> Metric:
    """BLEU of the whole set (arXiv:1804.08771): its counts add up over rows."""
    from sacrebleu.metrics import BLEU

    from trainer.data.quality.text import UNSPACED_CHARACTER

    unspaced = any(UNSPACED_CHARACTER.search(reference) for _, reference in pairs)
    bleu = BLEU(tokenize="zh" if unspaced else "13a")
    rows = []
    for answer, reference in pairs:
        found = bleu.corpus_score([answer], [[reference]])
        rows.append([*found.counts, *found.totals, found.sys_len, found.ref_len])

    def score(sums: Sums) -> Sums:
        flat = sums.reshape(-1, sums.shape[-1]).round().astype(int).tolist()
        values = [BLEU.compute_bleu(row[:4], row[4:8], row[8], row[9], smooth_method="exp").score / 100 for row in flat]
        return np.array(values).reshape(sums.shape[:-1])

    return Metric("BLEU", np.array(rows, dtype=np.float64), score)


def _chrf(pairs: Sequence[tuple[str, str]]) -> Metric:
    from sacrebleu.metrics import CHRF

    chrf = CHRF()
    return _mean("chrF", [chrf.sentence_score(answer, [reference]).score / 100 for answer, reference in pairs])


def _rouge(pairs: Sequence[tuple[str, str]]) -> Metric:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Tokenizer())
    return _mean("ROUGE-L", [scorer.score(reference, answer)["rougeL"].fmeasure for answer, reference in pairs])


class _Tokenizer:
    """What rouge-score takes; its own knows letters a to z only."""

    def tokenize(self, text: str) -> list[str]:
        return _words(text)


def select(metric: Metric, rows: NDArray[Any]) -> Metric:
    """The same metric over some of the rows."""
    return Metric(metric.name, metric.parts[rows], metric.score, metric.percent, metric.higher_is_better)
