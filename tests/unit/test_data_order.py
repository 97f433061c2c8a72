import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.order import rows_at


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
