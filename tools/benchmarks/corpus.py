"""Data for the comparisons, made from a seed: lengths, conversations, a tokenizer, token documents.

The lengths follow a mix of instruction and chat data (19,590 samples, 5.7 million tokens): half have less than 148
tokens, one in a hundred more than 2,217, the longest 26,032; a third of the tokens is supervised.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
LENGTHS = (20, 26, 37, 71, 148, 359, 551, 973, 2217, 26032)
SUPERVISED_SHARE = 0.34
TOKENS_A_WORD = 1.35
TEMPLATE_TOKENS = 12

# Letters, digits one by one, runs of other signs, white space: how recent byte-level tokenizers cut text.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def sample_lengths(count: int, seed: int) -> NDArray[np.int64]:
    """Lengths in tokens, int64 [count], log-linear between the quantiles above."""
    drawn = np.random.default_rng(seed).random(count)
    return np.exp(np.interp(drawn, QUANTILES, np.log(LENGTHS))).astype(np.int64)


def make_conversations(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows with `messages`: one to three turns, half of them in Latin letters, half in Chinese ones."""
    source = np.random.default_rng(seed)
    lengths = sample_lengths(count, seed + 1)
    latin, chinese = _latin_words(source), _chinese_words(source)
    rows = []
    for length in lengths.tolist():
        is_latin = source.random() < 0.5
        turns = int(source.integers(1, 4)) if length > 150 else 1
        words = max(2 * turns, int((length - TEMPLATE_TOKENS * turns) / TOKENS_A_WORD))
        answer = max(1, round(words * SUPERVISED_SHARE / turns))
        question = max(1, words // turns - answer)
        messages = []
        for _ in range(turns):
            for role, size in (("user", question), ("assistant", answer)):
                text = _sentences(source, latin if is_latin else chinese, size, " " if is_latin else "")
                messages.append({"role": role, "content": text})
        rows.append({"messages": messages})
    return rows


def _sentences(source: np.random.Generator, words: NDArray[np.str_], count: int, gap: str) -> str:
    """Words by Zipf's law, with full stops, line ends and a number now and then."""
    ranks = (len(words) ** source.random(count)).astype(np.int64) - 1
    chosen: list[str] = words[ranks].tolist()
    for index in range(11, count, 12):
        chosen[index] += ("." if gap else "。") + ("\n" if index % 5 == 0 else "")
    for index in range(29, count, 30):
        chosen[index] = str(int(source.integers(0, 5000)))
    return gap.join(chosen).strip()


def _latin_words(source: np.random.Generator, count: int = 40_000) -> NDArray[np.str_]:
    """Made-up words of one to four syllables, the frequent ones short."""
    onsets = ("", "b", "c", "d", "f", "g", "h", "l", "m", "n", "p", "r", "s", "t", "v", "w", "st", "tr", "th")
    ends = ("a", "e", "i", "o", "u", "an", "er", "in", "on", "es", "ing", "al", "ent", "ly", "ed", "y")
    syllables = [onset + end for onset in onsets for end in ends]
    longest = 2 + np.minimum(3, np.arange(count) // 2000)
    sizes = 1 + (source.random(count) * longest).astype(np.int64).clip(max=3)
    drawn = source.integers(0, len(syllables), (count, 4))
    words = [
        "".join(syllables[i] for i in row[:size]) for row, size in zip(drawn.tolist(), sizes.tolist(), strict=True)
    ]
    return np.array([word.capitalize() if rank % 9 == 0 else word for rank, word in enumerate(words)])


def _chinese_words(source: np.random.Generator, count: int = 20_000) -> NDArray[np.str_]:
    """One to three of 3,500 characters."""
    sizes = source.integers(1, 4, count)
    drawn = source.integers(0x4E00, 0x4E00 + 3500, (count, 3))
    return np.array(["".join(map(chr, row[:size])) for row, size in zip(drawn.tolist(), sizes.tolist(), strict=True)])


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows as JSON Lines."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def train_tokenizer(directory: Path, rows: Sequence[dict[str, Any]], vocabulary_size: int, template: str) -> Path:
    """Train a byte-level BPE tokenizer with ChatML control tokens on the texts of `rows` and save it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (message["content"] for row in rows for message in row["messages"] if message["content"])
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=template,
    )
    tokenizer.save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class TokenDocuments:
    """Already tokenised documents, flat.

    `ids` is uint16 [tokens] with `offsets` int64 [documents + 1]; `spans` int64 [spans, 2] are the supervised parts of
    each document, relative to it, with `span_offsets` int64 [documents + 1].
    """

    ids: NDArray[np.uint16]
    offsets: NDArray[np.int64]
    spans: NDArray[np.int64]
    span_offsets: NDArray[np.int64]


def make_token_documents(tokens: int, longest: int, seed: int, vocabulary_size: int = 32_000) -> TokenDocuments:
    """At least `tokens` random tokens in documents of the usual lengths, none longer than `longest`.

    The end of each document is supervised.
    """
    mean = float(np.minimum(sample_lengths(10_000, seed), longest).mean())
    lengths = np.minimum(sample_lengths(int(tokens / mean * 1.1) + 1000, seed), longest)
    count = int(np.searchsorted(np.cumsum(lengths), tokens)) + 1
    lengths = lengths[:count]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.random.default_rng(seed + 1).integers(3, vocabulary_size, int(offsets[-1]), dtype=np.uint16)
    starts = np.maximum(1, (lengths * (1 - SUPERVISED_SHARE)).astype(np.int64))
    return TokenDocuments(ids, offsets, np.stack([starts, lengths], axis=1), np.arange(count + 1))


def rows_as_documents(ids: NDArray[np.int32], mask: NDArray[np.uint8]) -> TokenDocuments:
    """Whole rows, [rows, length] each, as documents; the spans are the runs of ones in the mask."""
    rows, length = ids.shape
    edges = np.diff(mask.astype(np.int8), prepend=0, append=0, axis=1)
    row, start = np.nonzero(edges == 1)
    _, stop = np.nonzero(edges == -1)
    span_offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))]).astype(np.int64)
    return TokenDocuments(
        ids.astype(np.uint16).ravel(), np.arange(rows + 1) * length, np.stack([start, stop], axis=1), span_offsets
    )
