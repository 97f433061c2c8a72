import json
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.corpora import alpaca_rows, message_rows, recipe_of, save_tokenizer, tiny_store, write_json_lines
from trainer.config.deepspeed import micro_batches
from trainer.data.build.run import build_store
from trainer.data.feed import FIRST_ROWS, Feed, StepBatch, evaluation_batches
from trainer.data.micro_batch import IGNORED, MicroBatch, make_micro_batch
from trainer.data.mixture import mixed_order
from trainer.data.order import BlockOrder, GlobalOrder, Order
from trainer.data.store import TokenStore, open_store
from trainer.data.store.packing import RowPlan


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    rows = [*message_rows(25, seed=1, turns=4, longest=20), *message_rows(1, seed=9, longest=150)]
    return tiny_store(tmp_path_factory.mktemp("feed"), rows, sequence_length=160)


def feed_of(
    store: TokenStore, *, packing: bool = True, rank: int = 0, world: int = 1, micro: int = 2, batch: int = 6
) -> Feed:
    plan = store.plan(store.plan_spec(packing=packing))
    return feed_in(store, plan, GlobalOrder(plan.n_rows, 7), rank=rank, world=world, micro=micro, batch=batch)


def feed_in(
    store: TokenStore, plan: RowPlan, order: Order, *, rank: int = 0, world: int = 1, micro: int = 1, batch: int = 6
) -> Feed:
    return Feed(store, plan, order=order, global_batch_size=batch, micro_batch_size=micro, rank=rank, world_size=world)


def steps_of(feed: Feed, count: int) -> list[StepBatch]:
    """The next steps; ends the feed's thread."""
    with closing(feed):
        return [feed.next_step() for _ in range(count)]


def targets_of(batch: MicroBatch) -> list[tuple[tuple[int, ...], int]]:
    """Every target as (the ids of its sample up to it, target): independent of where in a batch it lies."""
    found = []
    for ids, targets, positions in zip(batch.input_ids, batch.targets, batch.position_ids, strict=True):
        for at in np.flatnonzero(targets != IGNORED):
            begin = at - positions[at]
            found.append((tuple(ids[begin : at + 1].tolist()), int(targets[at])))
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_any_world_size_and_micro_batch_gives_the_same_global_batch(store: TokenStore, packing: bool) -> None:
    steps = steps_of(feed_of(store, packing=packing), 4)
    expected = [Counter(target for micro in step.micro_batches for target in targets_of(micro)) for step in steps]
    assert all(expected)
    for world, micro in [
        (1, 1),
        (1, 4),
        (1, 6),
        (2, 1),
        (2, 2),
        (3, 1),
        (3, 2),
        (4, 1),
        (4, 3),
        (5, 1),
        (8, 1),
        (8, 2),
    ]:
        ranks = [
            steps_of(feed_of(store, packing=packing, rank=rank, world=world, micro=micro), 4) for rank in range(world)
        ]
        for step, right, batches in zip(steps, expected, zip(*ranks, strict=True), strict=True):
            got: Counter[tuple[tuple[int, ...], int]] = Counter()
            for batch in batches:
                assert len(batch.micro_batches) == micro_batches(len(batch.rows), micro, world)
                assert np.array_equal(batch.rows, step.rows)
                assert (batch.supervised_tokens, batch.tokens) == (step.supervised_tokens, step.tokens)
                for micro_batch in batch.micro_batches:
                    assert micro_batch.input_ids.shape[0] == micro
                    got.update(targets_of(micro_batch))
            assert got == right
            assert got.total() == step.supervised_tokens


@pytest.mark.parametrize(("packing", "sequence_length"), [(True, 160), (True, 48), (False, 160), (False, 37)])
def test_an_epoch_has_every_supervised_position_exactly_once(
    store: TokenStore, packing: bool, sequence_length: int
) -> None:
    plan = store.plan(store.plan_spec(sequence_length, packing=packing))
    feed = Feed(
        store, plan, order=GlobalOrder(plan.n_rows, 1), global_batch_size=1, micro_batch_size=1, rank=0, world_size=1
    )
    seen: Counter[tuple[int, int]] = Counter()
    steps = steps_of(feed, plan.n_rows + 1)
    assert steps.pop().epoch == 1
    for step in steps:
        assert step.epoch == 0
        (micro,) = step.micro_batches
        (samples,) = feed.samples_of_step(step)
        at = 0
        for sample in samples:
            ids = store.document(int(plan.document[sample]))[0]
            start, stop = int(plan.start[sample]), int(plan.stop[sample])
            size = stop - start
            assert np.array_equal(micro.input_ids[0, at : at + size], ids[start:stop])
            assert np.array_equal(micro.position_ids[0, at : at + size], np.arange(size))
            targets = micro.targets[0, at : at + size]
            assert targets[-1] == IGNORED, "the last token of a sample must not predict the first of the next"
            for offset in np.flatnonzero(targets != IGNORED):
                position = start + int(offset) + 1
                assert targets[offset] == ids[position]
                seen[int(plan.document[sample]), position] += 1
            at += size
        tail = micro.input_ids.shape[1] - at
        assert np.array_equal(micro.position_ids[0, at:], np.arange(tail))
        assert (micro.targets[0, at:] == IGNORED).all()
    supervised = {
        (index, position)
        for index in range(store.n_documents)
        for begin, end in store.document(index)[1].tolist()
        for position in range(begin, end)
    }
    assert seen == Counter(supervised)


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """A store of two inputs in many small shards."""
    directory = tmp_path_factory.mktemp("sources")
    files = [
        write_json_lines(directory / "chat.jsonl", message_rows(30, seed=2, turns=3, longest=15)),
        write_json_lines(directory / "facts.jsonl", alpaca_rows(25, seed=4)),
    ]
    build_store(recipe_of(files, save_tokenizer(directory / "tokenizer"), 160), directory / "store", shard_tokens=1500)
    return open_store(directory / "store")


def orders_of(store: TokenStore) -> dict[str, tuple[RowPlan, Order]]:
    """Each kind of order, with short epochs and segments."""
    plan, apart = store.plan(), store.plan(store.plan_spec(by_source=True))
    sizes = np.diff(apart.source_rows).tolist()
    sources = [BlockOrder(size, 5 + number, 4, 2) for number, size in enumerate(sizes)]
    return {
        "global": (plan, GlobalOrder(plan.n_rows, 7)),
        "blocks": (plan, BlockOrder(plan.n_rows, 7, 5, 3)),
        "mixture": (apart, mixed_order(sources, apart.source_rows[:-1], [(20, [3, 1]), (None, [1, 2])], 7)),
    }


@pytest.mark.parametrize("kind", ["global", "blocks", "mixture"])
def test_the_number_of_ranks_may_change_at_any_time(two_sources: TokenStore, kind: str) -> None:
    plan, order = orders_of(two_sources)[kind]
    straight = steps_of(feed_in(two_sources, plan, order, batch=6), 16)
    assert straight[-1].epoch >= 1
    expected = [Counter(target for micro in step.micro_batches for target in targets_of(micro)) for step in straight]
    position = 0
    for world, micro in [(1, 2), (2, 1), (3, 2), (4, 1), (5, 1), (8, 1), (16, 1), (64, 1)]:
        got: list[Counter[tuple[tuple[int, ...], int]]] = [Counter(), Counter()]
        for rank in range(world):
            feed = feed_in(two_sources, plan, order, rank=rank, world=world, micro=micro)
            feed.load_state_dict({"position": position})
            for number, step in enumerate(steps_of(feed, 2)):
                at = position // 6 + number
                assert step.rows.tolist() == straight[at].rows.tolist()
                assert step.supervised_tokens == straight[at].supervised_tokens
                got[number].update(target for batch in step.micro_batches for target in targets_of(batch))
            state = feed.state_dict()
        assert got == expected[position // 6 : position // 6 + 2], world
        position = state["position"]


@pytest.mark.parametrize("kind", ["global", "blocks", "mixture"])
def test_exact_continuation_from_any_position(two_sources: TokenStore, kind: str) -> None:
    plan, order = orders_of(two_sources)[kind]
    straight = [step.rows.tolist() for step in steps_of(feed_in(two_sources, plan, order), 40)]
    for done in np.random.default_rng(1).integers(0, 40, 8).tolist():
        first = feed_in(two_sources, plan, order)
        steps_of(first, done)
        # A state is what was handed out, not what was prepared.
        state = json.loads(json.dumps(first.state_dict()))
        assert state == {"position": done * 6}
        resumed = feed_in(two_sources, plan, order, world=3, rank=2)
        resumed.load_state_dict(state)
        assert [step.rows.tolist() for step in steps_of(resumed, 40 - done)] == straight[done:]
    assert len(json.dumps({"position": 10**18})) <= 200


def test_a_head_stands_in_front_and_only_the_window_is_a_target(tmp_path: Path) -> None:
    store = tiny_store(tmp_path, message_rows(3, seed=5, turns=8, longest=20), sequence_length=96)
    plan = store.plan()
    sample = int(np.flatnonzero(plan.start > 12)[0])
    pinned = replace(plan, head=np.where(np.arange(plan.n_samples) == sample, 10, 0).astype(np.uint32))
    pinned = replace(pinned, stop=np.where(pinned.head > 0, plan.stop - 10, plan.stop).astype(np.uint32))
    row = next(row for row in range(plan.n_rows) if sample in plan.samples_of(row).tolist())
    batch = make_micro_batch(store, pinned, [row])
    before = plan.samples_of(row).tolist().index(sample)
    at = sum(int(plan.stop[s] - plan.start[s]) for s in plan.samples_of(row)[:before])
    document, start, stop, first = (
        int(column[sample]) for column in (pinned.document, pinned.start, pinned.stop, pinned.first_target)
    )
    ids, spans = store.document(document)
    size = 10 + stop - start
    assert batch.input_ids[0, at : at + size].tolist() == [*ids[:10].tolist(), *ids[start:stop].tolist()]
    assert batch.position_ids[0, at : at + size].tolist() == list(range(size))
    wanted = [IGNORED] * size
    for begin, end in spans.tolist():
        for t in range(max(begin, first), min(end, stop)):
            wanted[10 + t - start - 1] = int(ids[t])
    assert batch.targets[0, at : at + size].tolist() == wanted
    assert set(wanted) != {IGNORED}


class Formula:
    """An array of a plan too large to exist: elements follow from their index. `touched` counts those asked for."""

    touched = 0

    def __init__(self, size: int, value: Callable[[Any], Any]) -> None:
        self._size, self._value = size, value

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        index = np.asarray(index, dtype=np.int64)
        Formula.touched += index.size
        return self._value(index)


class HugePlan:
    """10**9 rows of one sample each, of the documents of a small store in turn."""

    def __init__(self, store: TokenStore) -> None:
        self.n_rows = 10**9
        self.spec = store.spec
        self.sequence_length = store.spec.sequence_length
        sizes = np.array([min(len(store.document(i)[0]), self.sequence_length) for i in range(store.n_documents)])
        count = store.n_documents
        self.document = Formula(self.n_rows, lambda s: s % count)
        self.row_offsets = Formula(self.n_rows + 1, lambda s: s)
        self.row_samples = Formula(self.n_rows, lambda s: s)
        self.start = self.head = Formula(self.n_rows, lambda s: s * 0)
        self.first_target = Formula(self.n_rows, lambda s: s * 0 + 1)
        self.stop = self.tokens = self.supervised = Formula(self.n_rows, lambda s: sizes[s % count])

    def samples_of(self, row: int) -> np.ndarray:
        return np.array([row])


@pytest.mark.parametrize("kind", ["global", "blocks", "mixture"])
def test_the_first_batch_and_a_resume_read_no_more_of_a_billion_rows_than_they_need(
    store: TokenStore, kind: str
) -> None:
    plan: Any = HugePlan(store)
    half = plan.n_rows // 2
    sources = [BlockOrder(half, seed, 20_000, 16) for seed in (1, 2)]
    orders: dict[str, Callable[[], Order]] = {
        "global": lambda: GlobalOrder(plan.n_rows, 7),
        "blocks": lambda: BlockOrder(plan.n_rows, 7, 20_000, 16),
        "mixture": lambda: mixed_order(sources, np.array([0, half]), [(10**6 + 7, [1, 2]), (None, [3, 1])], 7),
    }
    for position in (0, 3 * plan.n_rows + 123_456_789):
        Formula.touched = 0
        feed = feed_in(store, plan, orders[kind](), batch=64, world=8, micro=4)
        feed.load_state_dict({"position": position})
        with closing(feed):
            feed.next_step()
        # A few columns of the rows of this step and of those that are prepared ahead.
        assert 64 <= Formula.touched < 64 * 100


def test_errors_come_where_their_step_would_have_come(store: TokenStore) -> None:
    plan = store.plan()

    class Broken(GlobalOrder):
        def rows_at(self, positions: np.ndarray) -> np.ndarray:
            rows = super().rows_at(positions)
            rows[positions >= kept] = plan.n_rows
            return rows

    # Rows are looked up for many steps at once.
    looked_up = FIRST_ROWS // 6 * 6
    kept = looked_up + 2
    feed = feed_in(store, plan, Broken(plan.n_rows, 1))
    assert [feed.next_step().position for _ in range(looked_up // 6)] == [*range(0, looked_up, 6)]
    for _ in range(2):
        with pytest.raises(IndexError):
            feed.next_step()
    assert feed.state_dict() == {"position": looked_up}
    feed.close()
    kept = 10**9
    assert feed.next_step().position == looked_up
    feed.close()


def test_closing_ends_the_thread_and_loses_nothing(store: TokenStore) -> None:
    before = threading.active_count()
    feed = feed_of(store)
    first = feed.next_step()
    assert threading.active_count() == before + 1
    feed.close()
    assert threading.active_count() == before
    feed.close()
    assert feed.next_step().position == first.position + 6
    feed.load_state_dict({"position": 0})
    assert threading.active_count() == before
    assert feed.next_step().rows.tolist() == first.rows.tolist()
    feed.close()


def test_a_step_may_cross_an_epoch(store: TokenStore) -> None:
    plan = store.plan()
    feed = feed_of(store, batch=plan.n_rows + 2, micro=4)
    rows = steps_of(feed, 1)[0].rows.tolist()
    assert sorted(rows[: plan.n_rows]) == list(range(plan.n_rows))
    assert feed.state_dict() == {"position": plan.n_rows + 2}


def test_shapes(store: TokenStore) -> None:
    for micro_batch in steps_of(feed_of(store, world=8, rank=7, micro=1, batch=3), 1)[0].micro_batches:
        assert micro_batch.input_ids.shape == (1, 160)
        assert (micro_batch.targets == IGNORED).all(), "rank 7 has only empty slots"
        assert np.array_equal(micro_batch.position_ids[0], np.arange(160))
    for micro_batch in steps_of(feed_of(store, packing=False), 1)[0].micro_batches:
        for array in (micro_batch.input_ids, micro_batch.targets, micro_batch.position_ids):
            assert array.dtype == np.int64
            assert array.shape[1] % 16 == 0
            assert array.shape[1] <= 160


def test_padding_is_the_pad_token(store: TokenStore) -> None:
    empty = steps_of(feed_of(store, world=8, rank=7, micro=1, batch=3), 1)[0].micro_batches[0]
    assert set(empty.input_ids[0].tolist()) == {store.padding_id} == {256}


@pytest.mark.parametrize(("world", "micro", "max_rows"), [(1, 1, 5), (2, 2, 5), (3, 2, 1000), (4, 1, 1)])
def test_evaluation_gives_all_ranks_as_many_batches(store: TokenStore, world: int, micro: int, max_rows: int) -> None:
    plan = store.plan(store.plan_spec(packing=False))
    ranks = [
        list(evaluation_batches(store, plan, micro_batch_size=micro, rank=rank, world_size=world, max_rows=max_rows))
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    targets = sum(int((batch.targets != IGNORED).sum()) for batches in ranks for batch in batches)
    chosen = np.arange(min(max_rows, plan.n_rows)) * plan.n_rows // min(max_rows, plan.n_rows)
    assert targets == plan.supervised[chosen].sum()


def test_many_shards_read_like_one(tmp_path: Path) -> None:
    rows = alpaca_rows(30, seed=3)
    one = tiny_store(tmp_path / "one", rows)
    many = tiny_store(tmp_path / "many", rows, shard_tokens=500)
    assert len([file for file in many.manifest["files"] if file["name"].startswith("tokens/")]) > 3
    for a, b in zip(steps_of(feed_of(one), 5), steps_of(feed_of(many), 5), strict=True):
        for left, right in zip(a.micro_batches, b.micro_batches, strict=True):
            assert np.array_equal(left.input_ids, right.input_ids)
            assert np.array_equal(left.targets, right.targets)
    assert np.array_equal(one.plan(one.plan_spec(64)).row_samples, many.plan(many.plan_spec(64)).row_samples)
    assert [one.place(i) for i in range(30)][7].endswith("rows.jsonl:8")
    assert [many.place(i).split(":")[-1] for i in range(30)] == [str(i + 1) for i in range(30)]
