import random

import pytest

from trainer.data.quality.leakage import Leak, find_leaks
from trainer.errors import UsageError

DRAW = random.Random(5)
WORDS = [f"word{i}" for i in range(500)]


def passage() -> list[str]:
    return DRAW.choices(WORDS, k=80)


BASE = [passage() for _ in range(6)]
TRAIN = [("train:1", " ".join(BASE[0])), ("train:2", " ".join(BASE[1])), ("train:3", " ".join(BASE[1]))]
TRAIN += [("train:4", " ".join(BASE[2])), ("train:5", " ".join([*BASE[2][:-3], "x", "y", "z"]))]
TEST = [
    ("test:1", " ".join(passage())),
    ("test:2", " ".join(BASE[1]).upper()),
    ("test:3", " ".join([*BASE[2][:-1], "q"])),
    ("test:4", " ".join(passage())),
]


def test_every_leaked_text_once_with_its_best_match() -> None:
    report = find_leaks({"train": iter(TRAIN), "test": iter(TEST)})
    exact, near = report.leaks
    assert exact == Leak("test", "test:2", "train", "train:2", "exact", 1.0)
    assert (near.place, near.other_place, near.kind) == ("test:3", "train:4", "near")
    assert 0.8 <= near.similarity < 1
    assert report.counts == {("test", "train", "exact"): 1, ("test", "train", "near"): 1}
    assert report.texts == {"train": 5, "test": 4}


def test_duplicates_inside_one_split_are_no_leak() -> None:
    assert find_leaks({"train": TRAIN, "test": TEST[:1]}).leaks == []
    assert find_leaks({"train": [], "test": []}).counts == {}


def test_three_splits_are_compared_pairwise() -> None:
    report = find_leaks({"train": TRAIN[:2], "validation": [("v:1", TRAIN[0][1])], "test": [("t:1", TRAIN[0][1])]})
    assert [(leak.place, leak.other_place) for leak in report.leaks] == [
        ("v:1", "train:1"),
        ("t:1", "train:1"),
        ("t:1", "v:1"),
    ]


def test_a_threshold_without_sense_is_refused() -> None:
    with pytest.raises(UsageError):
        find_leaks({"train": TRAIN}, threshold=0.0)
