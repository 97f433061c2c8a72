import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.order import BlockOrder, rows_at


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_every_epoch_is_a_permutation(n_rows: int, seed: int, epoch: int) -> None:
    positions = np.arange(epoch * n_rows, (epoch + 1) * n_rows)
    assert np.array_equal(np.sort(rows_at(positions, n_rows, seed)), np.arange(n_rows))


@given(st.integers(1, 500), st.integers(0, 2**32), st.lists(st.integers(0, 10**9), max_size=30))
@settings(max_examples=60, deadline=None)
def test_a_position_does_not_depend_on_its_neighbours(n_rows: int, seed: int, positions: list[int]) -> None:
    together = rows_at(np.array(positions, dtype=np.int64), n_rows, seed)
    alone = [int(rows_at(np.array([position]), n_rows, seed)[0]) for position in positions]
    assert together.tolist() == alone


def test_epochs_and_seeds_differ() -> None:
    n_rows = 1000
    orders = [rows_at(np.arange(n_rows) + epoch * n_rows, n_rows, seed) for epoch in (0, 1, 2) for seed in (0, 1)]
    for index, one in enumerate(orders):
        for other in orders[:index]:
            assert (one == other).mean() < 0.02


def test_rows_are_mixed_well() -> None:
    # Where a row lands must not depend on where it was: correlation and share of neighbours that stay neighbours.
    n_rows = 10007
    order = rows_at(np.arange(n_rows), n_rows, 3)
    assert abs(np.corrcoef(order, np.arange(n_rows))[0, 1]) < 0.04
    assert (np.abs(np.diff(order)) == 1).mean() < 0.002
    # Small sets too: over many epochs every row comes first about equally often.
    first = rows_at(np.arange(0, 7 * 7000, 7), 7, 3)
    assert np.bincount(first, minlength=7).min() > 850


def test_the_order_is_a_promise() -> None:
    # A checkpoint stores only the position: a change of this order would silently resume on other data.
    assert rows_at(np.arange(8), 10, 42).tolist() == [4, 7, 0, 6, 2, 1, 9, 8]


def test_impossible_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="no row"):
        rows_at(np.array([0]), 0, 1)
    with pytest.raises(ValueError, match="no row"):
        rows_at(np.array([-1]), 5, 1)


@given(st.integers(1, 400), st.integers(1, 60), st.integers(1, 9), st.integers(0, 2**63 - 1), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_every_epoch_of_blocks_is_a_permutation(n_rows: int, block: int, window: int, seed: int, epoch: int) -> None:
    order = BlockOrder(n_rows, seed, block, window)
    positions = np.arange(epoch * n_rows, (epoch + 1) * n_rows)
    rows = order.rows_at(positions)
    assert np.array_equal(np.sort(rows), np.arange(n_rows))
    alone = [int(order.rows_at(positions[at : at + 1])[0]) for at in range(0, n_rows, 37)]
    assert alone == rows[::37].tolist()
    # What is said to come near are just the rows of this and the next window.
    size = min(block, n_rows) * window
    for at in range(0, n_rows, 53):
        here = {row for low, high in order.ranges_near(int(positions[at])) for row in range(low, high + 1)}
        window_begin = min(at // size, (n_rows // min(block, n_rows) - 1) // window) * size
        assert set(rows[at : window_begin + size].tolist()) <= here


def test_blocks_stay_together_and_are_mixed_inside_a_window() -> None:
    order = BlockOrder(n_rows=1000, seed=5, block_rows=30, window_blocks=4)
    rows = order.rows_at(np.arange(1000))
    first = rows[:120]
    assert len(set((np.sort(first)[1:] - np.sort(first)[:-1]).tolist()) - {1}) <= 3, "more than four runs of rows"
    assert (np.abs(np.diff(first)) == 1).mean() < 0.1
    assert sorted(order.rows_at(np.arange(1000, 1120)).tolist()) != sorted(first.tolist())


def test_the_remainder_is_not_always_the_same_rows() -> None:
    order = BlockOrder(n_rows=23, seed=1, block_rows=10, window_blocks=1)
    last = [frozenset(order.rows_at(np.arange(23 * e + 20, 23 * e + 23)).tolist()) for e in range(40)]
    assert len(set(last)) > 20


def test_all_blocks_in_one_window_are_a_shuffle_of_everything() -> None:
    rows = BlockOrder(n_rows=5003, seed=3, block_rows=100, window_blocks=1000).rows_at(np.arange(5003))
    assert abs(np.corrcoef(rows, np.arange(5003))[0, 1]) < 0.05
    assert (np.abs(np.diff(rows)) == 1).mean() < 0.003


def test_the_order_of_blocks_is_a_promise() -> None:
    assert BlockOrder(10, 42, 3, 2).rows_at(np.arange(10)).tolist() == [9, 1, 7, 0, 2, 8, 3, 5, 4, 6]
    with pytest.raises(ValueError, match="no row"):
        BlockOrder(10, 42, 3, 2).rows_at(np.array([-1]))
    with pytest.raises(ValueError, match="no order"):
        BlockOrder(10, 42, 0, 2)
