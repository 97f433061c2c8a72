import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.quality.missing import (
    REASONS,
    AbnormalLimits,
    abnormal_turn,
    abnormality,
    compose_unicode,
    fix_record,
    strip_control_characters,
)
from trainer.data.records import Conversation, PlainText


def read_as(text: str, encoding: str) -> str:
    return text.encode().decode(encoding)


ABNORMAL = {
    "empty": ["", " \n\t", "\u3000"],
    "placeholder": ["NaN", " N/A ", "null", "None", "TODO", "-", "…", "#N/A", "暂无"],
    "replacement_characters": ["caf\ufffd is open"],
    "mojibake": [
        read_as("café au lait", "latin-1"),
        read_as("it’s “fine", "cp1252"),
        read_as("模型训练", "latin-1"),
        read_as("für später", "cp1252"),
        read_as("10 °C", "cp1252"),
    ],
    "control_characters": ["a\x00b", "bell\x07", "\ufeffstart", "next\x85line"],
    "repeated_character": ["a" * 60, "so " + "!" * 80, "哈" * 50 + "好"],
    "repeated_line": ["buy the best tea now\n" * 10, "intro\n" + "the very same line again\n" * 4],
    "html_escapes": ["Tom &amp; Ann &lt;3 &quot;tea&quot;", "a&nbsp;b&nbsp;c&#39;d"],
}
NORMAL = [
    "0",
    "No.",
    "None of them came.",
    "无论如何",
    "« Il est allé au café » — « déjà vu »…",
    "“CAFÉ” and ‘naïveté’…",
    "IRMÃ… MANHÃ» NÃO",
    "SÃO PAULO, Ângela",
    "a\tb\r\nc",
    "👩‍👩‍👧 नमस्ते שלום",
    "def f():\n    {\n    }\n    }\n    }\n    }\n    return 1 if x else 2",
    "<p>Tom &amp; Ann &lt;3 &quot;tea&quot;</p>",
    "R&D, AT&T; a && b; x &= y",
    "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 | and text that goes on",
    "1000000",
    "line one\nline one",
]


@pytest.mark.parametrize(("reason", "text"), [(reason, text) for reason, texts in ABNORMAL.items() for text in texts])
def test_what_says_nothing_is_named(reason: str, text: str) -> None:
    assert abnormality(text) == reason


@pytest.mark.parametrize("text", NORMAL)
def test_honest_text_passes(text: str) -> None:
    assert abnormality(text) is None


def test_every_reason_can_happen() -> None:
    assert tuple(ABNORMAL) == REASONS


def test_limits_are_the_users() -> None:
    assert abnormality("caf\ufffd", AbnormalLimits(replacement_characters=2)) is None
    assert abnormality("positive", AbnormalLimits(placeholders=frozenset({"positive"}))) == "placeholder"
    assert abnormality("None", AbnormalLimits(placeholders=frozenset())) is None


def test_the_turn_is_named_and_tools_may_say_nothing() -> None:
    call = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": call},
        {"role": "tool", "content": "null"},
    ]
    done = {"role": "assistant", "content": "done"}
    assert abnormal_turn(Conversation((*turns, done), None, "a:1")) is None
    bad = Conversation((*turns, {"role": "assistant", "content": "N/A"}), None, "a:1")
    assert abnormal_turn(bad) == ("placeholder", "assistant turn 4")
    silent = Conversation((turns[0], {"role": "assistant", "content": " "}), None, "a:1")
    assert abnormal_turn(silent) == ("empty", "assistant turn 2")
    assert abnormal_turn(PlainText("", "TODO", "a:1")) == ("placeholder", "assistant turn 1")


def test_control_characters_go_and_lines_stay_apart() -> None:
    assert strip_control_characters("\ufeffa\x00b\x0cc\x85d\te\r\n") == ("ab\nc\nd\te\r\n", 4)


def test_composing() -> None:
    assert compose_unicode("cafe\u0301") == ("café", 1)
    assert compose_unicode("café") == ("café", 0)


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_fixes_are_final_and_counted(text: str) -> None:
    stripped, count = strip_control_characters(text)
    assert strip_control_characters(stripped) == (stripped, 0)
    assert (count == 0) == (stripped == text)
    composed, changed = compose_unicode(stripped)
    assert unicodedata.is_normalized("NFC", composed)
    assert (changed == 0) == (composed == stripped)
    assert compose_unicode(composed)[1] == 0
    assert abnormality(composed) in (None, *REASONS)
    assert abnormality(composed) != "control_characters"


def test_a_record_is_fixed_and_counted() -> None:
    fixed, counts = fix_record(PlainText("cafe\u0301\x00", "\ufeffa\x01", "a:1"))
    assert fixed == PlainText("café", "a", "a:1")
    assert counts == {"control_characters": 3, "unicode_composed": 1}
    assert fix_record(fixed) == (fixed, {})
