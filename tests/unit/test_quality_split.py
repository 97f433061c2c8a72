from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.quality.split import assign_splits, folds, largest_remainder, split_by_time
from trainer.errors import DataError, UsageError

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
keys = st.lists(st.integers(0, 12), min_size=1, max_size=60).map(
    lambda values: np.array(values, dtype=np.uint64) * 7919
)


def groups_are_whole(group: np.ndarray, split: np.ndarray) -> bool:
    return all(len(set(split[group == key])) == 1 for key in set(group.tolist()))


@given(keys, st.integers(-5, 5), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_groups_stay_whole_and_order_is_irrelevant(group: np.ndarray, seed: int, order: object) -> None:
    split = assign_splits(group, SHARES, seed)
    assert groups_are_whole(group, split)
    rows = list(range(len(group)))
    order.shuffle(rows)  # type: ignore[attr-defined]
    assert np.array_equal(assign_splits(group[rows], SHARES, seed), split[rows])
    assert groups_are_whole(group, folds(group, 3, seed))
    strata = (np.arange(len(group)) % 3).astype(np.int64)
    assert groups_are_whole(group, assign_splits(group, SHARES, seed, strata))


def test_shares_hold_and_added_data_moves_nothing() -> None:
    group = np.random.default_rng(0).integers(0, 1 << 63, 40_000).astype(np.uint64)
    split = assign_splits(group, SHARES, 3)
    assert np.bincount(split) / len(group) == pytest.approx([0.8, 0.1, 0.1], abs=0.006)
    assert np.array_equal(assign_splits(group[:100], SHARES, 3), split[:100])
    other = assign_splits(group, SHARES, 4)
    assert np.mean(other == split) == pytest.approx(0.66, abs=0.02), "another seed is independent"
    assert np.bincount(folds(group, 5, 0)) / len(group) == pytest.approx([0.2] * 5, abs=0.008)


def test_neighbouring_keys_are_independent() -> None:
    split = assign_splits(np.arange(20_000, dtype=np.uint64), {"a": 0.5, "b": 0.5}, 0)
    assert np.mean(split[1:] == split[:-1]) == pytest.approx(0.5, abs=0.015)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=200), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_each_stratum_and_the_whole_have_the_shares(labels: list[int], seed: int) -> None:
    strata = np.array(labels, dtype=np.int64)
    split = assign_splits(np.arange(len(labels), dtype=np.uint64), SHARES, seed, strata)
    wanted = np.array([0.8, 0.1, 0.1])
    for label in set(labels):
        members = split[strata == label]
        assert (np.abs(np.bincount(members, minlength=3) - wanted * len(members)) < 2).all()
    assert (np.abs(np.bincount(split, minlength=3) - wanted * len(split)) <= 1.0001).all()


def test_strata_of_one_do_not_all_go_to_train() -> None:
    split = assign_splits(np.arange(100, dtype=np.uint64), SHARES, 0, np.arange(100))
    assert np.bincount(split).tolist() == [80, 10, 10]


def test_a_group_in_two_strata_goes_with_its_first() -> None:
    group = np.array([1, 1, 2, 3, 4], dtype=np.uint64)
    strata = np.array([0, 1, 0, 1, 1])
    moved = np.array([0, 0, 0, 1, 1])
    halves = {"a": 0.5, "b": 0.5}
    assert np.array_equal(assign_splits(group, halves, 1, strata), assign_splits(group, halves, 1, moved))


@given(st.lists(st.floats(-1, 20), min_size=1, max_size=6), st.integers(0, 80))
@settings(max_examples=80, deadline=None)
def test_remainders_sum_up(quota: list[float], total: int) -> None:
    counts = largest_remainder(np.array(quota), total)
    assert counts.sum() == total
    assert (counts >= 0).all()


def test_largest_remainder_by_hand() -> None:
    assert largest_remainder(np.array([4.0, 0.5, 0.5]), 5).tolist() == [4, 1, 0]
    assert largest_remainder(np.array([1.2, 1.7, 0.1]), 3).tolist() == [1, 2, 0]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_time_runs_from_train_to_test(values: list[int]) -> None:
    times = np.array(values, dtype=np.float64)
    split = split_by_time(times, SHARES)
    order = np.argsort(times)
    assert (np.diff(split[order].astype(int)) >= 0).all()
    assert groups_are_whole(times, split)
    largest_tie = max(Counter(values).values())
    counts = np.cumsum(np.bincount(split, minlength=3))
    assert (np.abs(counts - np.array([0.8, 0.9, 1.0]) * len(values)) <= largest_tie / 2 + 1e-6).all()


@pytest.mark.parametrize("shares", [{}, {"a": 0.5}, {"a": 1.2}, {"a": 0.0, "b": 1.0}, {"a": 1.5, "b": -0.5}])
def test_shares_without_sense_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        assign_splits(np.array([1], dtype=np.uint64), shares, 0)


def test_other_refusals() -> None:
    with pytest.raises(UsageError):
        folds(np.array([1], dtype=np.uint64), 1, 0)
    with pytest.raises(DataError, match="row 1"):
        split_by_time(np.array([1.0, np.nan]), SHARES)
    assert split_by_time(np.array([]), SHARES).tolist() == []
    assert assign_splits(np.array([], dtype=np.uint64), SHARES, 0, np.array([], dtype=np.int64)).tolist() == []
