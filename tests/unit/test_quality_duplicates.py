import random
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.quality import duplicates
from trainer.data.quality.duplicates import (
    bands_for,
    duplicate_key,
    exact_duplicates,
    near_duplicates,
    normalised,
    signature,
    signatures,
    similarity,
)
from trainer.errors import UsageError


def families(n: int, sizes: tuple[int, int], change: float, seed: int, words: list[str]) -> list[str]:
    """`n` random texts, each followed by up to four copies in which some words were replaced."""
    draw = random.Random(seed)
    texts = []
    for _ in range(n):
        base = draw.choices(words, k=draw.randint(*sizes))
        texts.append(base)
        for _ in range(draw.randint(0, 4)):
            share = draw.random() * change
            texts.append([draw.choice(words) if draw.random() < share else word for word in base])
    return ["".join(text) if len(words[0]) == 1 else " ".join(text) for text in texts]


def shingles(text: str) -> set[tuple[str, ...]]:
    units = list(text) if " " not in text else text.split()
    return {tuple(units[i : i + 5]) for i in range(max(len(units) - 4, 1))}


WORDS = [f"word{i}" for i in range(400)]
HAN = [chr(0x4E00 + i) for i in range(400)]


@pytest.mark.parametrize("words", [WORDS, HAN], ids=["words", "han"])
def test_precision_and_recall_against_brute_force(words: list[str]) -> None:
    texts = families(70, (40, 100), 0.12, 1, words)
    sets = [shingles(text) for text in texts]
    columns = signatures(texts)
    cluster = near_duplicates(columns, 0.7)
    similar, joined, errors = set(), set(), []
    for a, b in combinations(range(len(texts)), 2):
        jaccard = len(sets[a] & sets[b]) / len(sets[a] | sets[b])
        errors.append(float(similarity(columns[a], columns[b])) - jaccard)
        if jaccard >= 0.7:
            similar.add((a, b))
        if cluster[a] == cluster[b]:
            joined.add((a, b))
            assert jaccard > 0.3, "texts that have little in common are never joined"
    assert len(similar) > 40
    assert len(similar & joined) / len(similar) > 0.9
    # Joined pairs below the threshold: links of a chain, and estimates that were too high.
    assert len(similar & joined) / len(joined) > 0.6
    assert abs(np.mean(errors)) < 0.005
    assert np.max(np.abs(errors)) < 0.2  # standard error of 128 coins: 0.044


def test_what_is_the_same_text() -> None:
    assert duplicate_key("Ｔea\u3000time!\n") == duplicate_key(" tea  TIME!")
    assert duplicate_key("tea time") != duplicate_key("tea time!")
    assert normalised("Straße\tＡ") == "strasse a"
    assert all(0 <= half < 1 << 64 for half in duplicate_key("x"))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30))
@settings(max_examples=60, deadline=None)
def test_exact_duplicates_point_at_the_first(keys: list[tuple[int, int]]) -> None:
    found = exact_duplicates(np.array(keys, dtype=np.uint64).reshape(-1, 2))
    assert found.tolist() == [keys.index(key) for key in keys]


def test_a_signature_depends_on_the_text_alone() -> None:
    long = " ".join(WORDS * 30)  # more shingles than are hashed at once
    assert np.array_equal(signature(long), signature(long.upper()))
    assert signature(long).dtype == np.uint32
    assert (signature(" ") == 0xFFFFFFFF).all()
    assert similarity(signature("a b c d e"), signature("a b c d f")) < 0.2
    assert similarity(signature("3 + 4 = ? say it"), signature("3 - 4 = ? say it")) < 0.5
    assert similarity(signature("two words"), signature("words two")) < 0.2


def test_signatures_are_pinned() -> None:
    # A store keeps clusters: other constants would silently give other ones.
    assert signature("the quick brown fox jumps over the lazy dog")[:3].tolist() == PINNED


PINNED = [63613843, 261692476, 182013953]


@pytest.mark.parametrize(("threshold", "expected"), [(0.8, (16, 8)), (1.0, (1, 128))])
def test_bands(threshold: float, expected: tuple[int, int]) -> None:
    assert bands_for(threshold) == expected


@given(st.floats(0.2, 1.0))
@settings(max_examples=50, deadline=None)
def test_pairs_at_the_threshold_meet(threshold: float) -> None:
    bands, rows = bands_for(threshold)
    assert bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** bands >= 0.9


@pytest.mark.parametrize("threshold", [0.0, 0.1, 1.1])
def test_thresholds_without_sense_are_refused(threshold: float) -> None:
    with pytest.raises(UsageError):
        near_duplicates(signatures(["a"]), threshold)


def test_weak_resemblance_does_not_join(monkeypatch: pytest.MonkeyPatch) -> None:
    # 300 texts with the same long head: every pair is about 0.5 alike and thousands of pairs share a band.
    draw = random.Random(3)
    head = draw.choices(WORDS, k=60)
    texts = [" ".join(head + draw.choices(WORDS, k=24)) for _ in range(300)]
    texts += [texts[7] + " more", texts[150]]
    for pivots in (64, 2):  # with two pivots the bucket is split by further bands
        monkeypatch.setattr(duplicates, "_PIVOTS", pivots)
        cluster = near_duplicates(signatures(texts), 0.8)
        assert cluster[300] == 7
        assert cluster[301] == 150
        assert np.count_nonzero(cluster != np.arange(len(texts))) <= 6


def test_a_memory_map_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = signatures([*families(40, (5, 30), 0.1, 2, WORDS), "", " "])
    expected = near_duplicates(columns)
    columns.tofile(tmp_path / "signatures")
    monkeypatch.setattr(duplicates, "_ROWS_AT_ONCE", 7)
    mapped = np.memmap(tmp_path / "signatures", dtype=np.uint32, mode="r", shape=columns.shape)
    assert np.array_equal(near_duplicates(mapped), expected)
    assert expected[-1] == len(columns) - 2, "empty texts are one cluster"
    assert near_duplicates(np.empty((0, 128), dtype=np.uint32)).tolist() == []


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=40))
@settings(max_examples=60, deadline=None)
def test_joining_many_pairs_at_once_is_union_find(pairs: list[tuple[int, int]]) -> None:
    parent = np.arange(20)
    ends = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    duplicates._join(parent, ends[:, 0], ends[:, 1])
    duplicates._flatten(parent)
    component = list(range(20))
    for _ in range(20):
        for a, b in pairs:
            component[a] = component[b] = min(component[a], component[b])
    assert parent.tolist() == component
