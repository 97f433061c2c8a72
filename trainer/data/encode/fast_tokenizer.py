"""A twin of the tokenizer: the same ids, several times faster, or the reason why there is none.

Every twin is tried: on a stress list here, and on a fixed share of the user's own texts by `TextEncoder`, which raises
TwinMismatch at the first difference.

A SentencePiece model is encoded by its own library. Byte-level BPE is encoded by fastokens, which reads the tokenizer's
own definition and follows its list of merges; where it is not installed, cannot read the definition or gives other ids,
by tiktoken.

tiktoken merges the neighbours whose union has the lowest id, `tokenizers` the neighbours that stand first in its list
of merges. Both give the same ids on every text when

1. along the list of merges the ids of the unions never fall, and
2. the bytes of every token, merged by the list, become that very token.

Why: merging only ever looks at neighbours, so a stretch of text that ends up as one token passed through the states it
passes through when it is alone. At the first step where the two differ, tiktoken joins neighbours x, y that are not in
the list, though xy is a token. Alone, x y is then reached too and stays as it is: xy does not become itself, against 2.

A token that breaks 2 can never appear where whole words are not looked up first: it is left out. Where they are
(`ignore_merges`) it is kept if all ways to cut it in two are in the list, for then no neighbours can differ over it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from trainer.data.encode.sentencepiece_model import find_model, sentencepiece_encoder
from trainer.data.encode.stress_texts import stress_texts

# Longer texts may hold runs that overflow the stack of tiktoken's expressions: they are looked at before.
LONG_TEXT = 1 << 16
_WHITE_RUN = re.compile(r"\s++")

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same behind a step that isolates every digit: a digit is a word, and the end of the text for white space before.
GPT2_WORDS_BETWEEN_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
EVERYTHING = r"(?s:.+)"

# Unicode's White_Space, which `tokenizers` strips beside added tokens (Python's own strip also takes U+001C to U+001F).
WHITE_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)

# Characters that NFC leaves alone in any company of each other and in every version of Unicode.
_NFC_INERT = re.compile(
    "[\0-\u02ff\u2010-\u2027\u2030-\u205e\u2190-\u2328\u2500-\u27bf\u3000-\u3029\u3030-\u3098\u309b-\u30ff\u4e00-\u9fa5\uff00-\uffef]*+"
)

Encode = Callable[[str], list[int]]


class TwinMismatch(Exception):
    """The twin gave other ids than the tokenizer. Internal: whoever builds starts again without the twin.

    Attributes:
        text: on which they differ.
        reason: in a few words, for the log.
    """

    def __init__(self, text: str, twin: str) -> None:
        shown = text if len(text) <= 60 else f"{text[:60]}..."
        self.text = text
        self.reason = f"{twin} gave other ids on {shown!r}"
        super().__init__(text, twin)

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class NoTwin:
    """Why a tokenizer has no twin."""

    reason: str

    def __str__(self) -> str:
        return f"tokenizing with transformers: {self.reason}"


@dataclass(frozen=True)
class Twin:
    """Encodes text to the ids of a `tokenizers` backend without a post-processor.

    Attributes:
        name: of the library that does it.
        encode: ids of a text; None when it is too odd to be left to the twin (a word or white space without end).
        passed_over: why an installed, faster library is not used; empty if there is none.
    """

    name: str
    encode: Callable[[str], list[int] | None]
    passed_over: str = ""


def verified_twin(tokenizer: Any, directory: Path | None = None) -> Twin | NoTwin:
    """The twin of a tokenizer, equal on the stress list; else the reason why there is none.

    Args:
        tokenizer: a transformers tokenizer with a `tokenizers` backend.
        directory: where it was loaded from; a SentencePiece model is looked for there.
    """
    from tokenizers import Tokenizer

    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    definition |= {"truncation": None, "padding": None, "post_processor": None}
    backend = Tokenizer.from_str(json.dumps(definition))
    passed_over = ""
    try:
        if fastest := _fastokens(definition):
            return _checked(fastest, definition, backend)
    except _NoTwinError as error:
        passed_over = str(error)
    try:
        twin = _twin_of(definition, backend, directory)
        return replace(_checked(twin, definition, backend), passed_over=passed_over)
    except _NoTwinError as error:
        return NoTwin("; ".join(filter(None, (passed_over, str(error)))))


class _NoTwinError(Exception):
    """Why there is no twin; becomes NoTwin."""


class _AddedTokens:
    """Cuts added tokens out of text: the leftmost, of these the longest, first, as `tokenizers` does."""

    def __init__(self, tokens: Sequence[dict[str, Any]]) -> None:
        if any(token["single_word"] for token in tokens):
            raise _NoTwinError("an added token counts only as a single word")
        self.ids = {token["content"]: int(token["id"]) for token in tokens if token["content"]}
        if len(self.ids) != len(tokens):
            raise _NoTwinError("two added tokens are the same text, or one is empty")
        ordered = sorted(self.ids, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, ordered))})")
        self._strips = any(token["lstrip"] or token["rstrip"] for token in tokens)
        self._left = {token["content"] for token in tokens if token["lstrip"]}
        self._right = {token["content"] for token in tokens if token["rstrip"]}

    def cut(self, text: str) -> list[str]:
        """Text, added token, text, added token, ..., text; a text may be empty."""
        parts = self._pattern.split(text)
        if self._strips:
            for at in range(1, len(parts), 2):
                if parts[at] in self._left:
                    parts[at - 1] = parts[at - 1].rstrip(WHITE_SPACE)
                if parts[at] in self._right:
                    parts[at + 1] = parts[at + 1].lstrip(WHITE_SPACE)
        return parts


def _cutting_twin(
    name: str, ordinary: Encode, added: Sequence[dict[str, Any]], normalize: Callable[[str], str] | None
) -> Twin:
    """A twin by a library that knows neither added tokens nor normalisers.

    Args:
        name: of the library.
        ordinary: ids of text between added tokens.
        added: the added tokens of the backend's definition.
        normalize: the backend's normaliser.
    """
    exact = _AddedTokens([token for token in added if not token["normalized"]])
    contents = [token for token in added if token["normalized"]]
    if normalize is None:
        between = _cutting(_AddedTokens(contents), ordinary)
    else:
        inner = _cutting(
            _AddedTokens([token | {"content": normalize(token["content"])} for token in contents]), ordinary
        )

        def between(text: str) -> list[int]:
            return inner(normalize(text))

    encode = _cutting(exact, between)

    def encode_usual(text: str) -> list[int] | None:
        if len(text) > LONG_TEXT and any(
            match.end() - match.start() > LONG_TEXT for match in _WHITE_RUN.finditer(text)
        ):
            return None
        return encode(text)

    return Twin(name, encode_usual)


def _cutting(tokens: _AddedTokens, between: Encode) -> Encode:
    """An encoder that gives `tokens` their ids and leaves what is between them to `between`."""
    if not tokens.ids:
        return between
    cut, ids_of = tokens.cut, tokens.ids

    def encode(text: str) -> list[int]:
        parts = cut(text)
        ids = between(parts[0]) if parts[0] else []
        for at in range(1, len(parts), 2):
            ids.append(ids_of[parts[at]])
            if parts[at + 1]:
                ids += between(parts[at + 1])
        return ids

    return encode


def _twin_of(definition: dict[str, Any], backend: Any, directory: Path | None) -> Twin:
    added = definition["added_tokens"]
    if _is_byte_level(definition["pre_tokenizer"]):
        return _cutting_twin("tiktoken", _tiktoken(definition), added, _normalizer(definition["normalizer"], backend))
    file = None if directory is None else find_model(directory)
    encode = None if file is None else sentencepiece_encoder(file)
    if encode is None:
        raise _NoTwinError("it is neither byte-level BPE nor a SentencePiece model")
    if any(token["normalized"] for token in added):
        raise _NoTwinError("an added token is looked for in normalised text")
    return _cutting_twin("sentencepiece", encode, added, None)


def _checked(twin: Twin, definition: dict[str, Any], backend: Any) -> Twin:
    """The twin, if it is equal on the stress list."""
    tokens = [token["content"] for token in definition["added_tokens"]]
    texts = stress_texts(tokens if len(tokens) <= 64 else [*tokens[:32], *tokens[-32:]])
    for text, encoding in zip(texts, backend.encode_batch(texts, add_special_tokens=False), strict=True):
        if twin.encode(text) != encoding.ids:
            raise _NoTwinError(TwinMismatch(text, twin.name).reason)
    return twin


def _fastokens(definition: dict[str, Any]) -> Twin | None:
    """A twin by fastokens; None when it is not installed, and for SentencePiece, where it takes "<0x41>" for a byte."""
    if not _is_byte_level(definition["pre_tokenizer"]):
        return None
    try:
        from fastokens import Tokenizer
    except ImportError:
        return None
    try:
        encode = Tokenizer.from_json_str(json.dumps(definition)).encode
    except ValueError as error:
        raise _NoTwinError(f"fastokens cannot read the tokenizer: {error}") from None

    def ids_of(text: str) -> list[int] | None:
        try:
            ids: list[int] = encode(text).ids
        except ValueError:
            return None  # a limit of its regular expressions
        return ids

    return Twin("fastokens", ids_of)


# --- byte-level BPE ---


def _is_byte_level(pre_tokenizer: dict[str, Any] | None) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(pre_tokenizer))


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _tiktoken(definition: dict[str, Any]) -> Encode:
    try:
        import tiktoken
    except ImportError:
        raise _NoTwinError("tiktoken is not installed") from None
    words = _word_pattern(definition["pre_tokenizer"])
    ranks = _ranks(definition["model"])
    try:
        encoding = tiktoken.Encoding("twin", pat_str=words, mergeable_ranks=ranks, special_tokens={})
    except ValueError as error:
        raise _NoTwinError(f"tiktoken cannot read the pattern of words: {str(error).splitlines()[0]}") from None
    encode: Encode = encoding.encode_ordinary
    return encode


def _word_pattern(pre_tokenizer: dict[str, Any] | None) -> str:
    """The expression that cuts words, by which `tokenizers` and tiktoken cut alike."""
    *before, last = _steps(pre_tokenizer)
    if last["type"] != "ByteLevel":
        raise _NoTwinError("its bytes are not the last step of the pre-tokenizer")
    if last["add_prefix_space"]:
        raise _NoTwinError("it puts a space before every text")
    if not before:
        return GPT2_WORDS if last["use_regex"] else EVERYTHING
    step, *others = before
    if not others and step["type"] == "Digits" and step["individual_digits"] and last["use_regex"]:
        return GPT2_WORDS_BETWEEN_DIGITS
    if others or step["type"] != "Split" or last["use_regex"]:
        raise _NoTwinError(f"it cuts words in steps ({', '.join(step['type'] for step in (*before, last))})")
    kept = step["behavior"].lower(), step["invert"]
    if "Regex" not in step["pattern"] or kept not in (("isolated", False), ("removed", True)):
        raise _NoTwinError("it does not cut words by an expression that keeps them all")
    return str(step["pattern"]["Regex"])


def _ranks(model: dict[str, Any]) -> dict[bytes, int]:
    """Bytes of every token that text can become, and its id."""
    if model["type"] != "BPE":
        raise _NoTwinError(f"its model is {model['type']}, not BPE")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise _NoTwinError(f"its BPE has {option.replace('_', ' ')}")
    vocabulary, merges = model["vocab"], [(left, right) for left, right in model["merges"]]
    last = -1
    for number, (left, right) in enumerate(merges):
        if vocabulary[left + right] < last:
            raise _NoTwinError(f"merge {number} ({left} {right}) does not follow the order of ids")
        last = vocabulary[left + right]
    byte_of = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    if not byte_of.keys() <= vocabulary.keys():
        raise _NoTwinError("its vocabulary has not all 256 bytes")
    lost = _lost_tokens(vocabulary, merges)
    if lost and model.get("ignore_merges"):
        known = set(merges)
        for token in lost:
            cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
            if any(a in vocabulary and b in vocabulary and (a, b) not in known for a, b in cuts):
                raise _NoTwinError(f"the token {token!r} follows from no merge")
        lost = set()
    try:
        return {bytes(byte_of[c] for c in token): index for token, index in vocabulary.items() if token not in lost}
    except KeyError:
        raise _NoTwinError("a token of its vocabulary is not made of bytes") from None


def _lost_tokens(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> set[str]:
    """Tokens that their own text does not become."""
    from tokenizers import models

    model = models.BPE(vocab=vocabulary, merges=merges)
    return {
        token
        for token, index in vocabulary.items()
        if len(token) > 1 and [piece.id for piece in model.tokenize(token)] != [index]
    }


def _byte_symbols() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (the table of GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _normalizer(definition: dict[str, Any] | None, backend: Any) -> Callable[[str], str] | None:
    """The backend's own normaliser, left out where it changes nothing."""
    if definition is None or (definition["type"] == "Sequence" and not definition["normalizers"]):
        return None
    normalize = partial(_normalize_str, backend.normalizer)
    if definition["type"] != "NFC":
        return normalize
    return lambda text: text if _NFC_INERT.fullmatch(text) else normalize(text)


def _normalize_str(normalizer: Any, text: str) -> str:
    return str(normalizer.normalize_str(text))
