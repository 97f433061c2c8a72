"""Missing and abnormal values: texts that are there but say nothing, and what can be put right without guessing.

Checks look at one text (a turn), because a placeholder inside a long conversation is no placeholder. They return one of
`REASONS`, the key under which a row is counted. Fixes return (text, count) and never change what a reader sees.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from trainer.data.quality.text import map_text, turns_of
from trainer.data.records import Conversation, Record

REASONS = (
    "empty",
    "placeholder",
    "replacement_characters",
    "mojibake",
    "control_characters",
    "repeated_character",
    "repeated_line",
    "html_escapes",
)
PLACEHOLDERS = frozenset(
    """
    nan n/a na nil null none undefined todo tbd tba fixme missing #n/a #ref! #value! <na> <null> <none> (null) (none)
    [deleted] [removed] [empty] - -- --- — – ? ?? . .. ... … _ / \\ 无 空 暂无 待补充
    """.split()  # noqa: SIM905 (a table of words reads better than forty lines of one)
)

# C0 but tab, line feed and carriage return; DEL; C1; the byte order mark; the non-characters U+FFFE and U+FFFF.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
_LINE_BREAKS = frozenset("\x0b\x0c\x85")  # vertical tab, form feed, next line: they separate, so they leave a line feed

# UTF-8 read as Latin-1 or Windows-1252. Left out are the pairs that are also honest text, such as an accented letter
# before a closing quotation mark, or French é, no-break space, ».
_MOJIBAKE = re.compile(
    "â€|ï»¿|(?<![A-ZÀ-Þ])(?:Ã[\u0080-\u009f\u00a1-\u00a9\u00ab-\u00ba\u00bc-\u00bf]|Â[\u00a0-\u00a9\u00ab-\u00b6\u00b8-\u00ba\u00bf])"
    "|[à-ï][\u0080-\u009f\u00a1-\u00aa\u00ac-\u00b6\u00b8-\u00ba\u00bc-\u00bf]{2}"
)
_MOJIBAKE_LEAD = re.compile("[ÂÃà-ï]")  # most texts have none, and one class is searched eight times as fast
_HTML_ESCAPE = re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp|#\d{1,7}|#[xX][0-9a-fA-F]{1,6});")
_HTML_TAG = re.compile(r"</?[A-Za-z][^<>]*>")


@dataclass(frozen=True)
class AbnormalLimits:
    """When a text counts as abnormal.

    `placeholders` are compared without case and outer white space. A share is of the characters that are not white
    space. `html_escapes` is how many entities are too many in a text without a single tag: a text with tags is HTML.
    """

    placeholders: frozenset[str] = field(default=PLACEHOLDERS)
    replacement_characters: int = 1
    control_characters: int = 1
    mojibake: int = 1
    repeated_share: float = 0.5
    repeated_from: int = 40
    html_escapes: int = 3


def abnormality(text: str, limits: AbnormalLimits = AbnormalLimits()) -> str | None:
    """The first of `REASONS` that holds for `text`, None when it is fine."""
    stripped = text.strip()
    if not stripped:
        return "empty"
    if len(stripped) <= 16 and stripped.casefold() in limits.placeholders:
        return "placeholder"
    if text.count("\ufffd") >= limits.replacement_characters:
        return "replacement_characters"
    if _MOJIBAKE_LEAD.search(text) and _at_least(_MOJIBAKE, text, limits.mojibake):
        return "mojibake"
    if _at_least(_CONTROL, text, limits.control_characters):
        return "control_characters"
    if _repeats_a_character(text, limits):
        return "repeated_character"
    if _repeats_a_line(text, limits):
        return "repeated_line"
    if _at_least(_HTML_ESCAPE, text, limits.html_escapes) and not _HTML_TAG.search(text):
        return "html_escapes"
    return None


def abnormal_turn(record: Record, limits: AbnormalLimits = AbnormalLimits()) -> tuple[str, str] | None:
    """(reason, turn) of the first abnormal turn, such as ("placeholder", "assistant turn 2"); None when all are fine.

    Turns count from 1 over all messages. A turn that calls a tool may have no text, and a tool may answer nothing or
    with a placeholder: null is a result.
    """
    calls = [bool(message.get("tool_calls")) for message in record.messages] if isinstance(record, Conversation) else []
    for number, (role, text) in enumerate(turns_of(record), start=1):
        reason = abnormality(text, limits)
        if reason == "empty" and (role == "tool" or (calls and calls[number - 1])):
            continue
        if reason == "placeholder" and role == "tool":
            continue
        if reason:
            return reason, f"{role} turn {number}"
    return None


def strip_control_characters(text: str) -> tuple[str, int]:
    """(text without control characters, how many there were); those that end a line or page become a line feed."""
    return _CONTROL.subn(lambda match: "\n" if match.group() in _LINE_BREAKS else "", text)


def compose_unicode(text: str) -> tuple[str, int]:
    """(text in Unicode normal form C, 1 if that changed it else 0): é is one character, however it was typed."""
    if unicodedata.is_normalized("NFC", text):
        return text, 0
    return unicodedata.normalize("NFC", text), 1


def fix_record(record: Record) -> tuple[Record, Counter[str]]:
    """The record with both fixes in every text, and counts of "control_characters" and "unicode_composed" texts."""
    counts = Counter[str]()

    def change(text: str) -> str:
        text, stripped = strip_control_characters(text)
        text, composed = compose_unicode(text)
        counts.update({key: n for key, n in (("control_characters", stripped), ("unicode_composed", composed)) if n})
        return text

    return map_text(record, change), counts


def _at_least(pattern: re.Pattern[str], text: str, count: int) -> bool:
    return sum(1 for _ in islice(pattern.finditer(text), count)) == count


def _repeats_a_character(text: str, limits: AbnormalLimits) -> bool:
    if len(text) < limits.repeated_from:
        return False
    visible = "".join(text.split())
    if len(visible) < limits.repeated_from:
        return False
    # Sorted, a character that occurs more than k times is its own neighbour at distance k.
    codes = np.sort(np.frombuffer(visible.encode("utf-32-le", "surrogatepass"), dtype=np.uint32))
    distance = int(limits.repeated_share * len(codes))
    return bool((codes[distance:] == codes[: len(codes) - distance]).any())


def _repeats_a_line(text: str, limits: AbnormalLimits) -> bool:
    """One line, three times or more, is more than the share of the text; by characters, so that } lines are nothing."""
    lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
    if len(lines) < 3:
        return False
    total = sum(map(len, lines))
    line, count = max(Counter(lines).items(), key=lambda item: len(item[0]) * item[1])
    return total >= limits.repeated_from and count >= 3 and len(line) * count > limits.repeated_share * total
