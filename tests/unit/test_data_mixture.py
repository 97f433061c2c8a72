import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.mixture import BLOCK, MixedOrder, mixed_order, weights_of
from trainer.data.order import BlockOrder, GlobalOrder
from trainer.errors import UsageError

weights = st.lists(st.one_of(st.just(0.0), st.floats(0.001, 5)), min_size=3, max_size=3).filter(any)


@st.composite
def segments(draw: st.DrawFn) -> list[tuple[int | None, list[float]]]:
    lengths = draw(st.lists(st.integers(1, 3000), max_size=3))
    return [*((length, draw(weights)) for length in lengths), (None, draw(weights))]


def order_of(segments: list[tuple[int | None, list[float]]], sizes: tuple[int, ...] = (50, 7, 900)) -> MixedOrder:
    begins = np.concatenate([[0], np.cumsum(sizes)])[:-1]
    return mixed_order([GlobalOrder(size, 3 + number) for number, size in enumerate(sizes)], begins, segments, seed=3)


@given(segments())
@settings(max_examples=25, deadline=None)
def test_every_source_is_drawn_in_its_own_order_without_gap_or_repeat(
    mix: list[tuple[int | None, list[float]]],
) -> None:
    order = order_of(mix)
    total = sum(length or 0 for length, _ in mix) + 2 * BLOCK
    source, index = order.source_and_index(np.arange(total))
    begin = 0
    for length, shares in mix:
        end = total if length is None else begin + length
        exact = np.array(shares) / sum(shares)
        for first in range(begin, end, BLOCK):
            last = min(first + BLOCK, end)
            drawn = np.bincount(source[first:last], minlength=3)
            # Within one of the exact share in every block of a segment.
            assert (np.abs(drawn - exact * (last - first)) <= 1.01).all()
            assert not drawn[exact == 0].any()
        begin = end
    for number in range(3):
        assert index[source == number].tolist() == list(range(int((source == number).sum())))
    for position in (0, 1, total // 3, total - 1):
        assert order.drawn_before(position).tolist() == np.bincount(source[:position], minlength=3).tolist()
        alone = order.rows_at(np.array([position]))
        assert alone == order.rows_at(np.arange(total))[position]


def test_shares_are_exact_over_a_million_rows_and_small_weights_are_drawn() -> None:
    order = order_of([(None, [1, 1e-5, 2])])
    drawn = order.drawn_before(1 << 20)
    assert drawn.sum() == 1 << 20
    assert drawn.tolist() == [349524, 4, 699048]
    # Each in its turn, not all at the end.
    assert [int(order.drawn_before(part << 18)[1]) for part in (1, 2, 3)] == pytest.approx([1, 2, 3], abs=1)
    assert order.drawn_before(7 * (1 << 20)).tolist() == [7 * count for count in drawn]


def test_sources_alternate_inside_a_block() -> None:
    source, _ = order_of([(None, [1, 1, 0])]).source_and_index(np.arange(10 * BLOCK))
    changes = (np.diff(source) != 0).mean()
    assert 0.45 < changes < 0.55


def test_rows_of_each_source_are_those_of_its_order() -> None:
    order = mixed_order(
        [GlobalOrder(40, 1), None, BlockOrder(70, 2, 10, 2)],
        np.array([0, 40, 40]),
        [(100, [1, 0, 1]), (None, [0, 0, 1])],
        9,
    )
    rows = order.rows_at(np.arange(300))
    assert order.n_rows == 110
    first, second = rows[rows < 40], rows[rows >= 40] - 40
    assert first.tolist() == GlobalOrder(40, 1).rows_at(np.arange(50)).tolist()
    assert second.tolist() == BlockOrder(70, 2, 10, 2).rows_at(np.arange(250)).tolist()
    near = {row for low, high in order.ranges_near(150) for row in range(low, high + 1)}
    assert set(rows[150:160].tolist()) <= near
    assert min(near) >= 40
    assert order.rows_at(np.array([[0, 1], [2, 3]])).tolist() == rows[:4].reshape(2, 2).tolist()


def test_the_mixture_is_a_promise() -> None:
    # A checkpoint stores only the position: a change here would silently resume on other data.
    assert order_of([(5, [1, 0, 1]), (None, [1, 2, 3])]).rows_at(np.arange(12)).tolist() == [
        49,
        708,
        18,
        74,
        37,
        430,
        459,
        520,
        29,
        113,
        53,
        769,
    ]


def test_names_and_weights_that_cannot_be_meant_are_refused() -> None:
    assert weights_of({"b": 2}, ["a", "b"], "data.mixture.0.weights") == [0.0, 2.0]
    with pytest.raises(UsageError, match=r"data\.mixture\.0\.weights: the store has no source 'c'; its sources: a, b"):
        weights_of({"c": 2}, ["a", "b"], "data.mixture.0.weights")
    with pytest.raises(UsageError, match="less than a millionth"):
        order_of([(None, [1, 1e-9, 2])])
    with pytest.raises(UsageError, match="without a positive weight"):
        order_of([(None, [0, 0, 0])])
    with pytest.raises(ValueError, match="negative"):
        order_of([(None, [1, 1, 1])]).rows_at(np.array([-1]))
