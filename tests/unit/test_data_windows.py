import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.packing import pack, plan_rows
from trainer.data.windows import count_targets, cut_documents, cut_windows
from trainer.errors import DataError, UsageError

windows_and_overlaps = st.integers(2, 40).flatmap(lambda window: st.tuples(st.just(window), st.integers(1, window - 1)))


@given(st.integers(0, 300), windows_and_overlaps)
@settings(max_examples=200, deadline=None)
def test_every_token_but_the_first_is_a_target_exactly_once(length: int, sizes: tuple[int, int]) -> None:
    window, overlap = sizes
    windows = cut_windows(length, window, overlap)
    targets: list[int] = []
    for index, (start, stop, first_target) in enumerate(windows):
        assert 0 <= start < stop <= length
        assert stop - start == min(window, length)
        assert first_target > start
        targets += range(first_target, stop)
        if index:
            assert windows[index - 1][1] - start >= overlap
    assert targets == list(range(1, length))


@given(st.lists(st.integers(0, 200), max_size=20), windows_and_overlaps)
@settings(max_examples=100, deadline=None)
def test_many_documents_at_once_equal_one_by_one(lengths: list[int], sizes: tuple[int, int]) -> None:
    columns = cut_documents(np.array(lengths, dtype=np.int64), *sizes)
    expected = [(index, *window) for index, length in enumerate(lengths) for window in cut_windows(length, *sizes)]
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected


@pytest.mark.parametrize(("window", "overlap"), [(8, 0), (8, 8), (8, 9), (1, 1), (0, 0)])
def test_windows_that_cannot_work_are_refused(window: int, overlap: int) -> None:
    with pytest.raises(UsageError):
        cut_windows(10, window, overlap)


@st.composite
def documents(draw: st.DrawFn) -> list[tuple[int, list[tuple[int, int]]]]:
    """(length, disjoint rising spans) of some documents."""
    result = []
    for length in draw(st.lists(st.integers(1, 120), min_size=1, max_size=12)):
        borders = sorted(set(draw(st.lists(st.integers(0, length), max_size=8))))
        spans = list(zip(borders[::2], borders[1::2], strict=False))
        result.append((length, spans))
    return result


def arrays_of(docs: list[tuple[int, list[tuple[int, int]]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum([length for length, _ in docs])]).astype(np.uint64)
    span_offsets = np.concatenate([[0], np.cumsum([len(spans) for _, spans in docs])]).astype(np.uint64)
    flat = np.array([span for _, spans in docs for span in spans], dtype=np.uint32).reshape(-1, 2)
    return offsets, flat, span_offsets


@given(documents(), windows_and_overlaps, st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_plan_loses_nothing(
    docs: list[tuple[int, list[tuple[int, int]]]], sizes: tuple[int, int], packing: bool
) -> None:
    window, overlap = sizes
    offsets, spans, span_offsets = arrays_of(docs)
    plan = plan_rows(offsets, spans, span_offsets, sequence_length=window, overlap=overlap, packing=packing)
    assert sorted(plan.row_samples.tolist()) == list(range(plan.n_samples))
    counted = 0
    seen: list[tuple[int, int]] = []
    for row in range(plan.n_rows):
        samples = plan.samples_of(row)
        sizes_of_row = [int(plan.stop[s]) - int(plan.start[s]) for s in samples]
        assert sum(sizes_of_row) == plan.tokens[row] <= window
        assert len(samples) == 1 or packing
        in_row = [
            (int(plan.document[s]), t)
            for s in samples
            for begin, end in docs[int(plan.document[s])][1]
            for t in range(begin, end)
            if plan.first_target[s] <= t < plan.stop[s]
        ]
        assert len(in_row) == plan.supervised[row]
        counted += len(in_row)
        seen += in_row
    # Every supervised position but a document's very first token, once; windows that were dropped had none of them.
    assert sorted(seen) == [
        (index, t) for index, (_, doc_spans) in enumerate(docs) for b, e in doc_spans for t in range(max(b, 1), e)
    ]
    all_windows = sum(len(cut_windows(length, window, overlap)) for length, _ in docs)
    assert plan.n_samples + plan.dropped.sum() == all_windows
    assert (plan.supervised > 0).all()


@given(st.lists(st.integers(1, 64), max_size=400), st.integers(1, 80))
@settings(max_examples=100, deadline=None)
def test_packing_fits_and_is_deterministic(lengths: list[int], open_rows: int) -> None:
    array = np.array(lengths, dtype=np.int64)
    rows = pack(array, 64, open_rows)
    assert np.array_equal(rows, pack(array, 64, open_rows))
    if lengths:
        assert np.bincount(rows, weights=array).max() <= 64
        assert np.array_equal(np.unique(rows), np.arange(rows.max() + 1))
        first_seen = [int(np.argmax(rows == row)) for row in range(int(rows.max()) + 1)]
        assert first_seen == sorted(first_seen)


def test_packing_wastes_little() -> None:
    lengths = np.minimum(np.random.default_rng(0).lognormal(5, 1, 20_000).astype(np.int64) + 1, 2048)
    rows = pack(lengths, 2048)
    assert lengths.sum() / ((rows.max() + 1) * 2048) > 0.99


def test_a_sample_longer_than_a_row_is_refused() -> None:
    with pytest.raises(DataError):
        pack(np.array([5, 9]), 8)


def test_targets_are_counted_without_any_span() -> None:
    empty = np.empty((0, 2), dtype=np.uint32)
    offsets = np.array([0, 5], dtype=np.uint64)
    columns = cut_documents(np.array([5]), 4, 1)
    counts = count_targets(columns[0], columns[3], columns[2], empty, np.array([0, 0], dtype=np.uint64), offsets)
    assert counts.tolist() == [0, 0]
