"""Augmentation: changed copies of a record, a pure function of (seed, key, number of the copy).

Only what the user says is changed unless told otherwise, and never what the assistant answers: a damaged target would
be learnt. Words are what stands between white space, or one character of a script without spaces (Han, Kana, Thai);
there is no word segmentation, so Chinese loses or swaps single characters, while synonyms are found as whole words, the
longest first. Code blocks, numbers in digits or words, placeholders such as [EMAIL] and negations stay: without them
the answer would no longer be right.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import xxhash

from trainer.data.quality.text import UNSPACED_CHARACTER, map_turns
from trainer.data.records import Record
from trainer.errors import DataError, MissingInputError, UsageError

AUGMENTED_ROLES = ("user", "system", "tool")
NEGATIONS = frozenset(
    ("not", "no", "never", "none", "nor", "without", "cannot", "except", "不", "没", "無", "无", "非", "未", "别", "勿")
)
NUMERALS = frozenset("〇零一二三四五六七八九十百千万亿两半") | frozenset(
    (
        *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
        *("hundred", "thousand", "million", "billion", "dozen", "half", "twice", "once", "first", "second", "third"),
    )
)
_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
_UNSPACED = UNSPACED_CHARACTER.pattern
_TOKEN = re.compile(rf"\s+|\[[A-Z][A-Z0-9_]*(?:_[0-9a-f]{{6}})?\]|{_UNSPACED}|\w(?:(?!{_UNSPACED})[\w'’-])*|[^\w\s]")


@dataclass(frozen=True)
class AugmentSpec:
    """How records are augmented.

    `copies` of each record are tried; in each, `swap` of the words change places with the next one, `drop` of them are
    left out and `synonyms` of those that `synonym_table` knows are replaced (shares in [0, 1]). `roles` says whose
    texts are changed.

    Raises:
        UsageError: a share outside [0, 1], nothing to do, a synonym share without a table or the role assistant.
    """

    copies: int = 1
    swap: float = 0.0
    drop: float = 0.0
    synonyms: float = 0.0
    synonym_table: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    roles: tuple[str, ...] = ("user",)
    seed: int = 0

    def __post_init__(self) -> None:
        shares = {"swap": self.swap, "drop": self.drop, "synonyms": self.synonyms}
        if wrong := [name for name, share in shares.items() if not 0 <= share <= 1]:
            raise UsageError(f"{wrong[0]} {shares[wrong[0]]:g} of the words", "give a share from 0 to 1")
        if self.copies < 1 or not any(shares.values()):
            raise UsageError("this augmentation changes nothing", "give copies, and one of swap, drop and synonyms")
        if self.synonyms and not self.synonym_table:
            raise UsageError("synonyms without a table", "give a file of synonyms")
        if wrong := sorted(set(self.roles) - set(AUGMENTED_ROLES)):
            raise UsageError(f"texts of {wrong[0]} are not augmented", f"give some of {', '.join(AUGMENTED_ROLES)}")

    @cached_property
    def longest_synonym(self) -> int:
        """Characters of the longest word in the table."""
        return max(map(len, self.synonym_table), default=0)


def augmentations(record: Record, spec: AugmentSpec, key: int) -> list[Record]:
    """Up to `spec.copies` changed copies, all different; fewer when chance or a short text leaves nothing changed.

    `key` stands for the record, such as its content hash: the copies depend on it and the seed, not on its place. A
    `PlainText` changes in its prompt only; one without a prompt and a `TokenIds` have no copies.
    """
    copies = [record]
    for number in range(spec.copies):
        copy = _copy(record, spec, f"{spec.seed}:{key}:{number}")
        if copy not in copies:
            copies.append(copy)
    return copies[1:]


def _copy(record: Record, spec: AugmentSpec, name: str) -> Record:
    draw = random.Random(xxhash.xxh3_64_intdigest(name.encode())).random

    def change(role: str, text: str) -> str:
        return _augmented(text, spec, draw) if role in spec.roles else text

    return map_turns(record, change)


def load_synonyms(path: Path) -> dict[str, tuple[str, ...]]:
    """Synonyms of each word, in lower case, from a file.

    JSON (.json): {"word": ["synonym", ...], ...}. Anything else: lines of a word and its synonyms, between tabs; empty
    lines and lines that begin with # are passed over.

    Raises:
        MissingInputError: no such file.
        DataError: not UTF-8 text of this form, a word twice, or no words at all; names file and line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise MissingInputError(f"no file of synonyms {path}", "check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text", "write it as UTF-8") from error
    entries = _json_entries(text, path) if path.suffix == ".json" else _tab_entries(text, path)
    table: dict[str, tuple[str, ...]] = {}
    for place, word, synonyms in entries:
        key = word.casefold().strip()
        if not key or not all(synonym.strip() for synonym in synonyms):
            raise DataError(f"{place}: an empty word", "fill it in, or remove the line")
        if key in table:
            raise DataError(f"{place}: '{word}' was there before", "put all its synonyms into one line")
        if others := tuple(synonym.strip() for synonym in synonyms if synonym.casefold().strip() != key):
            table[key] = others
        else:
            raise DataError(f"{place}: '{word}' has no synonym", "add one, or remove the line")
    if not table:
        raise DataError(f"{path} has no synonyms", "write lines of: word, tab, synonym")
    return table


def _tab_entries(text: str, path: Path) -> list[tuple[str, str, list[str]]]:
    entries = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.startswith("#"):
            word, *synonyms = line.rstrip("\t ").split("\t")
            entries.append((f"{path}:{number}", word, synonyms))
    return entries


def _json_entries(text: str, path: Path) -> list[tuple[str, str, list[str]]]:
    try:
        value = json.loads(text, object_pairs_hook=list)
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise DataError(f"{path}:{line}: not JSON", 'write {"word": ["synonym", ...]}') from error
    if not (isinstance(value, list) and all(isinstance(pair, tuple) for pair in value)):
        raise DataError(f"{path}:1: not a JSON object", 'write {"word": ["synonym", ...]}')
    for word, synonyms in value:
        if not (isinstance(synonyms, list) and all(isinstance(synonym, str) for synonym in synonyms)):
            raise DataError(f"{path}: synonyms of '{word}' are no list of strings", 'write {"word": ["synonym", ...]}')
    return [(str(path), word, synonyms) for word, synonyms in value]


def _augmented(text: str, spec: AugmentSpec, draw: Callable[[], float]) -> str:
    """The text with everything but its code changed."""
    parts = _CODE.split(text)  # text, code, text, ...
    parts[::2] = [_changed(part, spec, draw) for part in parts[::2]]
    return "".join(parts)


def _changed(text: str, spec: AugmentSpec, draw: Callable[[], float]) -> str:
    tokens = _with_synonyms(text, spec, draw) if spec.synonyms else _TOKEN.findall(text)
    if spec.swap:
        _swap(tokens, spec.swap, draw)
    return "".join(_dropped(tokens, spec.drop, draw) if spec.drop else tokens)


def _with_synonyms(text: str, spec: AugmentSpec, draw: Callable[[], float]) -> list[str]:
    """Tokens of the text, some runs of them replaced; at each place the longest run that is in the table counts."""
    tokens = _TOKEN.findall(text)
    result, at = [], 0
    while at < len(tokens):
        stop = _end_of_known_run(tokens, at, spec)
        if stop > at and draw() < spec.synonyms:
            original = "".join(tokens[at:stop])
            choices = spec.synonym_table[original.casefold()]
            chosen = choices[int(draw() * len(choices))]
            result.append(chosen[:1].upper() + chosen[1:] if original[:1].isupper() else chosen)
            at = stop
        else:
            result += tokens[at : max(stop, at + 1)]
            at = max(stop, at + 1)
    return result


def _end_of_known_run(tokens: list[str], at: int, spec: AugmentSpec) -> int:
    run, known = "", at
    for stop in range(at, len(tokens)):
        run += tokens[stop].casefold()
        if len(run) > spec.longest_synonym:
            break
        if run in spec.synonym_table:
            known = stop + 1
    return known


def _movable(token: str) -> bool:
    """Words may move or go: no white space, punctuation, numbers, placeholders or negations."""
    lower = token.casefold()
    fixed = lower in NEGATIONS or lower in NUMERALS or "n't" in lower or any(map(str.isdigit, token))
    return token[:1].isalpha() and not fixed


def _swap(tokens: list[str], share: float, draw: Callable[[], float]) -> None:
    """Swap words with the next one in place; nothing but white space lies between the two, and neither moves twice."""
    at = 0
    while at < len(tokens):
        following = at + 2 if at + 1 < len(tokens) and tokens[at + 1].isspace() else at + 1
        if (
            following < len(tokens)
            and _movable(tokens[at])
            and _movable(tokens[following])
            and "\n" not in tokens[at + 1]
            and draw() < share
        ):
            tokens[at], tokens[following] = tokens[following], tokens[at]
            at = following
        at += 1


def _dropped(tokens: list[str], share: float, draw: Callable[[], float]) -> list[str]:
    """The tokens that stay; with a word goes the white space before it, and one word always stays."""
    words = sum(map(_movable, tokens))
    result: list[str] = []
    for token in tokens:
        if _movable(token) and words > 1 and draw() < share:
            words -= 1
            if result and result[-1] == " ":
                result.pop()
        else:
            result.append(token)
    return result
