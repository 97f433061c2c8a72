import pickle
from pathlib import Path

import numpy as np
import pytest

from trainer.data.quality.filters import (
    LengthLimits,
    filter_reason,
    length_reason,
    load_filter,
    script_reason,
    script_shares,
)
from trainer.data.records import Conversation, PlainText, TokenIds
from trainer.errors import DataError, UsageError


def chat(question: str, answer: str) -> Conversation:
    return Conversation(({"role": "user", "content": question}, {"role": "assistant", "content": answer}), None, "a:1")


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (LengthLimits(), None),
        (LengthLimits(min_characters=7, max_characters=7, min_answer=2, max_answer=2), None),
        (LengthLimits(min_characters=8), "too_short"),
        (LengthLimits(max_characters=6), "too_long"),
        (LengthLimits(min_answer=3), "answer_too_short"),
        (LengthLimits(max_answer=1), "answer_too_long"),
    ],
)
def test_lengths(limits: LengthLimits, reason: str | None) -> None:
    assert length_reason(chat("what", "ok"), limits) == reason
    assert length_reason(PlainText("what ", "ok", "a:1"), limits) == reason
    assert length_reason(TokenIds(np.array([1]), (), "a:1"), limits) is None
    assert pickle.loads(pickle.dumps(limits)) == limits


@pytest.mark.parametrize("values", [{"min_answer": 3, "max_answer": 2}, {"max_characters": 0}, {"min_characters": -1}])
def test_limits_nothing_can_meet_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        LengthLimits(**values)


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("hello Müller ﬁn", {"latin": 1.0}),
        ("你好吗 ab!", {"han": 0.6, "latin": 0.4}),
        ("々〇\U00020000", {"han": 1.0}),
        ("すごいカード", {"kana": 1.0}),
        ("한국", {"hangul": 1.0}),
        ("привет", {"cyrillic": 1.0}),
        ("مرحبا", {"arabic": 1.0}),
        ("ไทย ελ", {"other": 1.0}),
        ("12 + 3 = 15 € 👍", {}),
        ("", {}),
    ],
)
def test_script_shares(text: str, shares: dict[str, float]) -> None:
    found = script_shares(text)
    assert {script: share for script, share in found.items() if share} == pytest.approx(shares)


def test_keep_what_is_in_the_allowed_scripts() -> None:
    assert script_reason("你好吗 ab", ["han"], 0.6) is None
    assert script_reason("你好吗 ab", ["han"], 0.7) == "script"
    assert script_reason("日本語です", ["han", "kana"], 1.0) is None
    assert script_reason("1 + 1 = 2", ["han"], 0.9) is None
    with pytest.raises(UsageError, match="klingon"):
        script_reason("a", ["klingon"], 0.5)
    with pytest.raises(UsageError):
        script_reason("a", ["latin"], 0.0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    (tmp_path / "own_rules.py").write_text(
        "value = 3\ndef keep(text): return 'tea' in text\ndef odd(text): return 1\ndef bad(text): return text[99]\n"
    )
    (tmp_path / "broken_rules.py").write_text("1 / 0\n")
    return tmp_path


def test_a_function_of_the_users(folder: Path) -> None:
    assert load_filter("own_rules:keep", folder)("green tea") is True
    assert filter_reason("own_rules:keep", "green tea", "a:1", folder) is None
    assert filter_reason("own_rules:keep", "water", "a:1", folder) == "filter own_rules:keep"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("keep", "module:function"),
        ("own_rules:", "module:function"),
        ("no_such_rules:keep", "no_such_rules.py"),
        ("own_rules:lost", "no function 'lost'"),
        ("own_rules:value", "no function 'value'"),
        ("broken_rules:keep", "ZeroDivisionError"),
    ],
)
def test_a_function_that_cannot_be_loaded(folder: Path, name: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_filter(name, folder)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("function", "words"), [("odd", "int, not bool"), ("bad", "IndexError")])
def test_a_function_that_fails_names_the_row(folder: Path, function: str, words: str) -> None:
    with pytest.raises(DataError) as caught:
        filter_reason(f"own_rules:{function}", "text", "data.jsonl:7", folder)
    assert "data.jsonl:7" in str(caught.value)
    assert words in str(caught.value)
