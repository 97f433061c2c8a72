import pickle
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.quality.augment import AugmentSpec, augmentations, load_synonyms
from trainer.data.quality.text import answer_of, turns_of
from trainer.data.records import Conversation, PlainText, TokenIds
from trainer.errors import DataError, MissingInputError, UsageError

TABLE = {"quick": ("fast", "rapid"), "trace back": ("undo",), "手机": ("电话",), "手机号": ("号码",)}
QUESTION = "Tom did not eat 3 red apples, so how many green apples are left over in the large old basket today?"


def chat(question: str, answer: str = "Four red apples stay.") -> Conversation:
    turns = {"system": "Be very kind to all of them", "user": question, "assistant": answer}
    return Conversation(tuple({"role": role, "content": text} for role, text in turns.items()), None, "a:1")


def user_text(record: object) -> str:
    return next(text for role, text in turns_of(record) if role == "user")  # type: ignore[arg-type]


def test_copies_depend_on_seed_and_key_alone() -> None:
    spec = AugmentSpec(copies=3, swap=0.3, drop=0.1)
    copies = augmentations(chat(QUESTION), spec, key=7)
    assert len({user_text(copy) for copy in copies} - {QUESTION}) == 3
    random.seed(1)
    assert augmentations(chat(QUESTION), pickle.loads(pickle.dumps(spec)), key=7) == copies
    assert augmentations(chat(QUESTION), spec, key=8) != copies
    assert augmentations(chat(QUESTION), AugmentSpec(copies=3, swap=0.3, drop=0.1, seed=1), key=7) != copies


@given(st.text(max_size=80), st.floats(0, 1), st.floats(0.1, 1), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_answers_and_other_roles_never_change(question: str, swap: float, drop: float, key: int) -> None:
    record = chat(question)
    for copy in augmentations(record, AugmentSpec(swap=swap, drop=drop), key):
        assert isinstance(copy, Conversation)
        assert (copy.messages[0], copy.messages[2]) == (record.messages[0], record.messages[2])
        assert user_text(copy) != question


def test_a_swap_keeps_every_word() -> None:
    (copy,) = augmentations(chat(QUESTION), AugmentSpec(swap=0.5), key=1)
    assert sorted(re.findall(r"\w+", user_text(copy))) == sorted(re.findall(r"\w+", QUESTION))
    (copy,) = augmentations(chat("今天天气很好，我们去公园散步。"), AugmentSpec(swap=0.9), key=1)
    assert sorted(user_text(copy)) == sorted("今天天气很好，我们去公园散步。")
    assert user_text(copy)[6] == "，", "words stay on their side of punctuation"


def test_what_carries_the_meaning_is_never_dropped() -> None:
    text = "Mail [EMAIL_1a2b3c] of 12 apples, three x2 is not `a b c`\n```\nlet me be\n```\n不要去"
    (copy,) = augmentations(chat(text), AugmentSpec(drop=1.0), key=1)
    assert user_text(copy) == " [EMAIL_1a2b3c] 12, three x2 is not `a b c`\n```\nlet me be\n```\n不去"
    (copy,) = augmentations(chat("all of it"), AugmentSpec(drop=1.0), key=1)
    assert user_text(copy).strip() == "it", "one word always stays"


def test_synonyms() -> None:
    spec = AugmentSpec(synonyms=1.0, synonym_table=TABLE)
    (copy,) = augmentations(chat("Quick, trace back quickly"), spec, key=1)
    assert user_text(copy) in ("Fast, undo quickly", "Rapid, undo quickly")
    (copy,) = augmentations(chat("我的手机号和手机"), spec, key=1)
    assert user_text(copy) == "我的号码和电话", "the longest word counts"
    assert augmentations(chat("nothing known"), spec, key=1) == []


def test_a_prompt_is_changed_and_its_completion_is_not() -> None:
    (copy,) = augmentations(PlainText("tea pot cup bowl dish pan", "seven eight", "a:1"), AugmentSpec(swap=1.0), key=1)
    assert answer_of(copy) == "seven eight"
    assert user_text(copy) == "pot tea bowl cup pan dish"
    assert augmentations(PlainText("", "seven eight", "a:1"), AugmentSpec(swap=1.0), key=1) == []
    assert augmentations(TokenIds(np.array([1]), (), "a:1"), AugmentSpec(swap=1.0), key=1) == []


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"swap": 1.5},
        {"drop": -0.1},
        {"synonyms": 0.5},
        {"swap": 0.1, "copies": 0},
        {"swap": 0.1, "roles": ("assistant",)},
    ],
)
def test_a_spec_without_sense_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        AugmentSpec(**values)  # type: ignore[arg-type]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_files_of_synonyms(tmp_path: Path) -> None:
    expected = {"quick": ("fast", "rapid"), "手机": ("电话",)}
    assert load_synonyms(write(tmp_path / "a.tsv", "# mine\nQuick\tfast\trapid\n\n手机\t电话\n")) == expected
    assert load_synonyms(write(tmp_path / "a.json", '{"Quick": ["fast", "rapid"], "手机": ["电话"]}')) == expected


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.tsv", "big\tlarge\nlonely\n", "a.tsv:2: 'lonely' has no synonym"),
        ("a.tsv", "big\tlarge\nBig\thuge\n", "a.tsv:2: 'Big' was there before"),
        ("a.tsv", "big\t\tlarge\n", "a.tsv:1: an empty word"),
        ("a.tsv", "# nothing\n", "has no synonyms"),
        ("a.json", '{"a":\n["b"', "a.json:2: not JSON"),
        ("a.json", '["a"]', "not a JSON object"),
        ("a.json", '{"a": "b"}', "synonyms of 'a' are no list"),
        ("a.json", '{"a": ["b"], "A": ["c"]}', "'A' was there before"),
    ],
)
def test_bad_files_of_synonyms(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(DataError) as caught:
        load_synonyms(write(tmp_path / name, text))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError):
        load_synonyms(tmp_path / "none.tsv")
    (tmp_path / "b.tsv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError):
        load_synonyms(tmp_path / "b.tsv")
