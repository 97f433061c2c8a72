import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.store import packing
from trainer.data.store.packing import PlanSpec, plan_rows, window_of
from trainer.data.store.windows import SAMPLE_COLUMNS, cut_documents, cut_windows
from trainer.errors import DataError, UsageError

windows_and_overlaps = st.integers(2, 40).flatmap(lambda window: st.tuples(st.just(window), st.integers(1, window - 1)))


class Document:
    """What a plan knows of a document."""

    def __init__(
        self,
        length: int,
        spans: list[tuple[int, int]],
        turn_ends: list[int] | None = None,
        head: int = 0,
        source: int = 0,
    ) -> None:
        self.length, self.spans, self.turn_ends, self.head, self.source = length, spans, turn_ends or [], head, source

    def __repr__(self) -> str:
        return f"Document({self.length}, {self.spans}, {self.turn_ends}, {self.head}, {self.source})"

    @property
    def supervised(self) -> list[int]:
        """Positions that can be targets: nothing predicts the first token."""
        return [t for begin, end in self.spans for t in range(max(begin, 1), end)]


@st.composite
def documents(draw: st.DrawFn) -> list[Document]:
    made = []
    for length in draw(st.lists(st.integers(1, 150), min_size=1, max_size=10)):
        borders = sorted(set(draw(st.lists(st.integers(0, length), max_size=8))))
        turns = sorted(set(draw(st.lists(st.integers(1, length), max_size=6))))
        head, source = draw(st.integers(0, min(length, 25))), draw(st.integers(0, 2))
        made.append(Document(length, list(zip(borders[::2], borders[1::2], strict=False)), turns, head, source))
    return made


def shards_of(docs: list[Document], size: int = 4) -> list[dict[str, np.ndarray]]:
    def offsets(counts: list[int]) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)

    return [
        {
            "document_offsets": offsets([doc.length for doc in part]),
            "loss_spans": np.array([span for doc in part for span in doc.spans], dtype=np.uint32).reshape(-1, 2),
            "span_offsets": offsets([len(doc.spans) for doc in part]),
            "turn_ends": np.array([end for doc in part for end in doc.turn_ends], dtype=np.uint32),
            "turn_offsets": offsets([len(doc.turn_ends) for doc in part]),
            "head": np.array([doc.head for doc in part], dtype=np.uint32),
            "source": np.array([doc.source for doc in part], dtype=np.uint16),
        }
        for part in (docs[first : first + size] for first in range(0, len(docs), size))
    ]


@given(st.integers(0, 300), windows_and_overlaps)
@settings(max_examples=60, deadline=None)
def test_every_token_but_the_first_is_a_target_exactly_once(length: int, sizes: tuple[int, int]) -> None:
    window, overlap = sizes
    windows = cut_windows(length, window, overlap)
    targets: list[int] = []
    for index, (start, stop, first_target, head) in enumerate(windows):
        assert 0 <= start < stop <= length
        assert (stop - start, head) == (min(window, length), 0)
        assert first_target > start
        targets += range(first_target, stop)
        if index:
            assert windows[index - 1][1] - start >= overlap
    assert targets == list(range(1, length))


@given(documents(), windows_and_overlaps)
@settings(max_examples=60, deadline=None)
def test_many_documents_at_once_equal_one_by_one(docs: list[Document], sizes: tuple[int, int]) -> None:
    window, overlap = sizes
    heads = [min(doc.head, window // 2, window - 2) for doc in docs]
    (shard,) = shards_of(docs, size=100)
    columns = cut_documents(
        np.array([doc.length for doc in docs]),
        window,
        overlap,
        shard["turn_ends"],
        shard["turn_offsets"],
        np.array(heads),
    )
    expected = [
        (index, *cut)
        for index, (doc, head) in enumerate(zip(docs, heads, strict=True))
        for cut in cut_windows(doc.length, window, overlap, doc.turn_ends, head)
    ]
    found = list(zip(*(getattr(columns, name).tolist() for name in SAMPLE_COLUMNS), strict=True))
    assert found == expected


def test_conversations_are_cut_where_turns_end() -> None:
    # The turn that ends at 70 is the last that fits. 20 tokens of context would begin at 50; a turn began at 60. What
    # is left after 130 fits one window, which then takes as much context as it can hold.
    assert cut_windows(200, 100, 20, [30, 60, 70, 130, 190]) == [(0, 70, 1, 0), (60, 130, 70, 0), (100, 200, 130, 0)]
    # A turn longer than the window is cut between tokens.
    assert cut_windows(250, 100, 20, [40, 240]) == [
        (0, 40, 1, 0),
        (20, 120, 40, 0),
        (100, 200, 120, 0),
        (150, 250, 200, 0),
    ]
    # The head stands in front and counts: 70 tokens are left for the rest.
    assert cut_windows(200, 100, 20, [95], head=30) == [
        (0, 95, 1, 0),
        (75, 145, 95, 30),
        (125, 195, 145, 30),
        (130, 200, 195, 30),
    ]


@pytest.mark.parametrize(("window", "overlap"), [(8, 0), (8, 8), (8, 9), (1, 1), (0, 0)])
def test_windows_that_cannot_work_are_refused(window: int, overlap: int) -> None:
    with pytest.raises(UsageError):
        cut_windows(10, window, overlap)
    with pytest.raises(UsageError):
        plan_rows([], PlanSpec(16, window, overlap), 1)


@given(documents(), windows_and_overlaps, st.booleans(), st.booleans(), st.booleans(), st.integers(0, 9))
@settings(max_examples=80, deadline=None)
def test_a_plan_loses_nothing(
    docs: list[Document], sizes: tuple[int, int], packing: bool, pin: bool, by_source: bool, longer_rows: int
) -> None:
    window, overlap = sizes
    spec = PlanSpec(window + longer_rows, window, overlap, pin_prefix=pin, packing=packing, by_source=by_source)
    plan = plan_rows(shards_of(docs), spec, 3)
    assert sorted(plan.row_samples.tolist()) == list(range(plan.n_samples))
    assert (np.diff(plan.document.astype(int)) >= 0).all()
    seen: list[tuple[int, int]] = []
    for row in range(plan.n_rows):
        samples = plan.samples_of(row).tolist()
        sizes_of_row = []
        in_row = []
        for sample in samples:
            document, start, stop, first, head = (int(getattr(plan, name)[sample]) for name in SAMPLE_COLUMNS)
            doc = docs[document]
            assert 0 <= start < first <= stop <= doc.length
            assert head == 0 or (pin and start >= head == doc.head)
            sizes_of_row.append(head + stop - start)
            in_row += [(document, t) for t in doc.supervised if first <= t < stop]
        assert max(sizes_of_row) <= window
        assert sum(sizes_of_row) == plan.tokens[row] <= spec.sequence_length
        assert len(samples) == 1 or packing
        assert len(in_row) == plan.supervised[row] > 0
        if by_source:
            (source,) = {docs[int(plan.document[sample])].source for sample in samples}
            assert plan.source_rows[source] <= row < plan.source_rows[source + 1]
        seen += in_row
    assert plan.source_rows[-1] == plan.n_rows
    assert len(plan.source_rows) == (4 if by_source else 2)
    # Every supervised position but a document's very first token, once; windows that were dropped had none of them.
    assert sorted(seen) == [(index, t) for index, doc in enumerate(docs) for t in doc.supervised]
    assert not plan.lost.any()
    for index, doc in enumerate(docs):
        too_long = pin and doc.length > window and doc.head > min(window // 2, window - 2)
        assert bool(plan.unpinned[index]) == too_long
        head = doc.head if pin and not too_long else 0
        mine = np.flatnonzero(plan.document == index)
        cuts = cut_windows(doc.length, window, overlap, doc.turn_ends, head)
        assert len(mine) + plan.dropped[index] == len(cuts)
        for number, sample in enumerate(mine.tolist()):
            found = window_of(plan, sample)
            assert (found.document, found.index, found.of) == (index, number, len(mine))
            assert (found.start, found.stop, found.first_target, found.head) in cuts


@given(documents(), windows_and_overlaps)
@settings(max_examples=30, deadline=None)
def test_other_policies_count_what_they_lose(docs: list[Document], sizes: tuple[int, int]) -> None:
    window, overlap = sizes
    for policy in ("truncate", "drop"):
        plan = plan_rows(shards_of(docs), PlanSpec(window, window, overlap, long_text=policy), 3)
        for index, doc in enumerate(docs):
            kept = doc.length if doc.length <= window else window if policy == "truncate" else 0
            assert plan.lost[index] == sum(t >= kept for t in doc.supervised)
            (stops,) = (plan.stop[plan.document == index].tolist(),)
            assert stops == ([kept] if any(t < kept for t in doc.supervised) else [])


def test_a_long_document_can_be_an_error() -> None:
    docs = [Document(8, [(1, 3)]) for _ in range(6)] + [Document(9, [(1, 3)]), Document(10, [(1, 3)])]
    with pytest.raises(DataError, match=r"^row 7: 9 tokens do not fit the window of 8"):
        plan_rows(shards_of(docs), PlanSpec(8, 8, 1, long_text="error"), 1, lambda index: f"row {index + 1}")
    assert plan_rows(shards_of(docs), PlanSpec(10, 10, 1, long_text="error"), 1).n_samples == 8


def test_plans_of_different_specs_have_different_names() -> None:
    specs = [
        PlanSpec(64, window, overlap, pin, policy, packing, by_source)
        for window in (32, 64)
        for overlap in (4, 8)
        for pin in (True, False)
        for policy in ("windows", "truncate", "drop", "error")
        for packing in (True, False)
        for by_source in (True, False)
    ]
    assert len({spec.name for spec in specs}) == len(specs)


@given(st.lists(st.integers(1, 64), max_size=400), st.integers(1, 500), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_packing_fits_and_is_deterministic(lengths: list[int], lookahead: int, open_rows: int) -> None:
    array = np.array(lengths, dtype=np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "LOOKAHEAD", lookahead)
        patch.setattr(packing, "OPEN_ROWS", open_rows)
        rows = packing.pack(array, 64)
        assert np.array_equal(rows, packing.pack(array, 64))
    if lengths:
        assert np.bincount(rows, weights=array).max() <= 64
        assert np.array_equal(np.unique(rows), np.arange(rows.max() + 1))
        first_seen = [int(np.argmax(rows == row)) for row in range(int(rows.max()) + 1)]
        assert first_seen == sorted(first_seen)


def chat_lengths(count: int) -> np.ndarray:
    """Lengths as in a mix of instruction and chat sets: half are below 148 tokens, one in a hundred above 2,217."""
    shares = [0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1]
    lengths = [20, 26, 37, 71, 148, 359, 551, 973, 2217, 26_032]
    drawn = np.random.default_rng(0).random(count)
    return np.exp(np.interp(drawn, shares, np.log(lengths))).astype(np.int64)


def test_packing_wastes_at_most_half_a_percent() -> None:
    docs = [Document(int(length), [(1, int(length))]) for length in chat_lengths(20_000)]
    plan = plan_rows(shards_of(docs, 5_000), PlanSpec(2048, 2048, 256), 1)
    assert 0 < plan.padding_share <= 0.005


def test_packing_fills_rows_of_samples_that_are_all_alike() -> None:
    # As in a set of instructions without short ones: what fits best must be looked for among many.
    lengths = np.random.default_rng(1).integers(31, 668, 30_000)
    rows = packing.pack(lengths, 2048)
    assert 1 - lengths.sum() / ((rows.max() + 1) * 2048) <= 0.003


def test_a_sample_longer_than_a_row_is_refused() -> None:
    with pytest.raises(DataError):
        packing.pack(np.array([5, 9]), 8)


def test_documents_without_any_span_make_no_row() -> None:
    plan = plan_rows(shards_of([Document(5, []), Document(9, [])]), PlanSpec(4, 4, 1), 1)
    assert plan.n_rows == plan.n_samples == 0
    assert plan.dropped.tolist() == [2, 3]
