"""Text of the data never becomes a control token.

Control tokens are the tokenizer's special tokens and those other added tokens that the chat template writes itself (an
added `<molecule>` that no template writes is vocabulary and stays a token). Where the data contains the text of one
(`<|im_end|>` in a user's message, `<tool_call>` in a tool's result) it is enclosed in two private-use characters before
the template is rendered. They are cut out of the rendered text again, and what was between them is encoded by a twin of
the tokenizer that knows no control tokens: the text stays exact to the byte, its ids are those of plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from xxhash import xxh3_64_intdigest

from trainer.data.encode.fast_tokenizer import Twin, TwinMismatch
from trainer.errors import DataError

# Plane 15 private use: in no training text by accident; data that has them is refused. A template may escape them.
_OPEN, _CLOSE = "\U000f8ad0", "\U000f8ad1"
_ESCAPED_OPEN, _ESCAPED_CLOSE = (json.dumps(mark)[1:-1] for mark in (_OPEN, _CLOSE))
_OPENS = f"(?:{_OPEN}|{re.escape(_ESCAPED_OPEN)})"
_CLOSES = f"(?:{_CLOSE}|{re.escape(_ESCAPED_CLOSE)})"
# In every text that has an escaped mark: the first half of its surrogate pair.
_ESCAPED_SIGN = _ESCAPED_OPEN[:6]
_MARKS = re.compile(f"{_OPENS}((?:(?!{_OPENS}|{_CLOSES}).)*){_CLOSES}|{_OPENS}|{_CLOSES}", re.DOTALL)

# Of the pieces that the twin encodes, the tokenizer encodes one in so many too, chosen by their hash, and the first
# ones after every `check_again`.
CHECKED_SHARE = 64
CHECKED_FIRST = 64


class TextEncoder:
    """Marks control-token texts in data, and encodes rendered text that has such marks.

    Args:
        tokenizer: a transformers tokenizer with a `tokenizers` backend; without a chat template only special tokens are
            control tokens.
        twin: encodes faster; what it gives is compared with the tokenizer on a share of the texts.

    `contents` are the texts of all control tokens, `stop_ids` the special ones among them, which can end a turn.
    """

    def __init__(self, tokenizer: Any, twin: Twin | None = None) -> None:
        from tokenizers import Tokenizer

        templates = tokenizer.chat_template or ""
        written = templates if isinstance(templates, str) else "\n".join(templates.values())
        definition = json.loads(tokenizer.backend_tokenizer.to_str())
        definition |= {"truncation": None, "padding": None, "post_processor": None}
        specials = set(tokenizer.all_special_tokens)
        control = [
            token
            for token in definition["added_tokens"]
            if token["special"]
            or token["content"] in specials
            or (token["content"] in written and not token["content"].isspace())
        ]
        self.contents = sorted((token["content"] for token in control), key=len, reverse=True)
        self.stop_ids = {int(token["id"]) for token in control if token["special"]}
        if tokenizer.eos_token_id is not None:
            self.stop_ids.add(int(tokenizer.eos_token_id))
        self.pattern = re.compile("|".join(map(re.escape, self.contents)) or "(?!)")
        self._control_ids = {int(token["id"]) for token in control}
        # A proper beginning of a control token at the end of one string could meet its rest in the template or in the
        # next string, and the other way round.
        self._beginnings = tuple({text[:size] for text in self.contents for size in range(1, len(text))})
        self._endings = tuple({text[size:] for text in self.contents for size in range(1, len(text))})
        self._normalized = definition["normalizer"] is not None and any(token["normalized"] for token in control)
        self._whole = Tokenizer.from_str(json.dumps(definition))
        others = [token for token in definition["added_tokens"] if int(token["id"]) not in self._control_ids]
        self._plain_definition = definition | {"added_tokens": others}
        self._plain: Any = None
        self._twin = twin
        self.check_again()
        # SentencePiece-like tokenizers put a space before the first word of whatever they are given. A piece from the
        # middle of a conversation is then encoded after a newline, whose ids are cut off again.
        self._newline = _ids(self._whole, "\n")
        self._needs_anchor = _ids(self._whole, "\nword")[len(self._newline) :] != _ids(self._whole, "word")

    def mark(self, value: Any, found: list[str], place: str) -> Any:
        """`value` with every control-token text in its strings (keys too) enclosed in marks and added to `found`.

        Raises:
            DataError: the data contains the marks themselves, or half a surrogate pair.
        """
        if isinstance(value, str):
            _check_characters(value, place)
            if _OPEN in value or _CLOSE in value:
                raise DataError(
                    f"{place}: the private-use character U+F8AD0 or U+F8AD1",
                    "remove it; these two mark neutralised text here",
                )
            marked, texts = self._mark_text(value)
            found.extend(texts)
            return marked
        if isinstance(value, dict):
            return {self.mark(key, found, place): self.mark(item, found, place) for key, item in value.items()}
        if isinstance(value, list):
            return [self.mark(item, found, place) for item in value]
        return value

    def encode(self, text: str, *, first: bool) -> list[int]:
        """Ids of rendered text with marks; `first` when it begins the conversation.

        Raises:
            DataError: the tokenizer cannot write a control token's text as plain text, or the text has half a
                surrogate pair.
            TwinMismatch: the twin is none.
        """
        _check_characters(text)
        if _OPEN not in text and _CLOSE not in text and _ESCAPED_SIGN not in text:
            return self._encode_piece(self._ids_of, text, first=first) if text else []
        ids: list[int] = []
        for piece, literal in _pieces(text):
            if literal:
                ids += self._encode_literal(piece, first=first)
            else:
                ids += self._encode_piece(self._ids_of, piece, first=first)
            first = False
        return ids

    def check_again(self) -> None:
        """Compare the next pieces with the tokenizer, every one: call it where a new piece of input begins.

        What is compared then depends on the input alone, never on which process encodes how much of it.
        """
        self._unchecked = CHECKED_FIRST

    def _ids_of(self, text: str) -> list[int]:
        """Ids of text without marks, by the twin where there is one."""
        ids = None if self._twin is None else self._twin.encode(text)
        if self._twin is None or ids is None:
            return _ids(self._whole, text)
        if self._unchecked > 0 or xxh3_64_intdigest(text.encode()) % CHECKED_SHARE == 0:
            self._unchecked -= 1
            if ids != _ids(self._whole, text):
                raise TwinMismatch(text, self._twin.name)
        return ids

    def _mark_text(self, text: str) -> tuple[str, list[str]]:
        if self._normalized:
            # Control tokens that match normalised text: only the tokenizer itself knows where.
            places = self._control_places(text)
        else:
            places = [match.span() for match in self.pattern.finditer(text)]
        if not places:
            return self._guard_edges(text), []
        parts, last = [], 0
        for start, stop in places:
            parts += [text[last:start], _OPEN, text[start:stop], _CLOSE]
            last = stop
        parts.append(text[last:])
        return self._guard_edges("".join(parts)), [text[start:stop] for start, stop in places]

    def _control_places(self, text: str) -> list[tuple[int, int]]:
        encoding = self._whole.encode(text, add_special_tokens=False)
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        return [offsets for token, offsets in pairs if token in self._control_ids and offsets[0] < offsets[1]]

    def _guard_edges(self, text: str) -> str:
        """A lone mark where the text ends with the beginning, or begins with the end, of a control token."""
        stripped = text.rstrip()
        if stripped.endswith(self._beginnings):
            text = stripped + _CLOSE + text[len(stripped) :]
        stripped = text.lstrip()
        if stripped.startswith(self._endings):
            text = text[: len(text) - len(stripped)] + _CLOSE + stripped
        return text

    def _encode_piece(self, ids_of: Callable[[str], list[int]], text: str, *, first: bool) -> list[int]:
        if first or not self._needs_anchor:
            return ids_of(text)
        anchored = ids_of("\n" + text)
        if anchored[: len(self._newline)] == self._newline:
            return anchored[len(self._newline) :]
        return ids_of(text)

    def _encode_literal(self, text: str, *, first: bool) -> list[int]:
        """Ids of control-token text as plain text."""
        if self._plain is None:
            from tokenizers import Tokenizer

            self._plain = Tokenizer.from_str(json.dumps(self._plain_definition))
        plain_ids = partial(_ids, self._plain)
        ids = self._encode_piece(plain_ids, text, first=first)
        if self._control_ids.isdisjoint(ids):
            return ids
        # The model itself knows the whole text as one piece: encode its characters one by one.
        ids = []
        for character in text:
            ids += self._encode_piece(plain_ids, character, first=first)
            first = False
        if self._control_ids.isdisjoint(ids):
            return ids
        raise DataError(f"the tokenizer cannot write {text!r} as plain text", "remove this text from the data")


def _ids(backend: Any, text: str) -> list[int]:
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids


def _check_characters(text: str, place: str = "") -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place + ': ' if place else ''}half a surrogate pair, U+{ord(text[error.start]):04X}",
            "write the whole character, or remove it",
        ) from error


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """(text without marks, whether it was enclosed in them) in order."""
    last = 0
    for match in _MARKS.finditer(text):
        if match.start() > last:
            yield text[last : match.start()], False
        if match.group(1):
            yield match.group(1), True
        last = match.end()
    if last < len(text):
        yield text[last:], False
