from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.support.corpora import alpaca_rows, message_rows, tiny_store
from trainer.config.deepspeed import micro_batches
from trainer.data.feed import IGNORED, Feed, MicroBatch, evaluation_batches
from trainer.data.order import GlobalOrder
from trainer.data.reader import TokenStore


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    rows = [*message_rows(25, seed=1, turns=4, longest=20), *message_rows(1, seed=9, longest=150)]
    return tiny_store(tmp_path_factory.mktemp("feed"), rows, sequence_length=160)


def feed_of(
    store: TokenStore, *, packing: bool = True, rank: int = 0, world: int = 1, micro: int = 2, batch: int = 6
) -> Feed:
    return Feed(
        store,
        plan := store.plan(store.plan_spec(packing=packing)),
        order=GlobalOrder(plan.n_rows, 7),
        global_batch_size=batch,
        micro_batch_size=micro,
        rank=rank,
        world_size=world,
    )


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
    reference = feed_of(store, packing=packing)
    steps = [reference.next_step() for _ in range(4)]
    expected = [Counter(target for micro in step.micro_batches for target in targets_of(micro)) for step in steps]
    assert all(expected)
    for world, micro in [(1, 1), (1, 4), (1, 6), (2, 1), (2, 2), (3, 1), (3, 2), (4, 1), (4, 3), (8, 1), (8, 2)]:
        feeds = [feed_of(store, packing=packing, rank=rank, world=world, micro=micro) for rank in range(world)]
        for step, right in zip(steps, expected, strict=True):
            batches = [feed.next_step() for feed in feeds]
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
    for _ in range(plan.n_rows):
        step = feed.next_step()
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
    assert feed.next_step().epoch == 1


def test_exact_continuation_from_every_position_on_any_world_size(store: TokenStore) -> None:
    def steps(feed: Feed, count: int) -> list[list[int]]:
        return [feed.next_step().rows.tolist() for _ in range(count)]

    straight = feed_of(store)
    expected = steps(straight, 12)
    for done in range(12):
        feed = feed_of(store)
        steps(feed, done)
        state = feed.state_dict()
        assert state == {"position": done * 6}
        for world, rank in [(1, 0), (3, 2)]:
            resumed = feed_of(store, world=world, rank=rank, micro=1)
            resumed.load_state_dict(state)
            assert steps(resumed, 12 - done) == expected[done:]


def test_a_step_may_cross_an_epoch(store: TokenStore) -> None:
    plan = store.plan()
    feed = feed_of(store, batch=plan.n_rows + 2, micro=4)
    rows = feed.next_step().rows.tolist()
    assert sorted(rows[: plan.n_rows]) == list(range(plan.n_rows))
    assert feed.state_dict() == {"position": plan.n_rows + 2}


def test_shapes(store: TokenStore) -> None:
    for micro_batch in feed_of(store, world=8, rank=7, micro=1, batch=3).next_step().micro_batches:
        assert micro_batch.input_ids.shape == (1, 160)
        assert (micro_batch.targets == IGNORED).all(), "rank 7 has only empty slots"
        assert np.array_equal(micro_batch.position_ids[0], np.arange(160))
    for micro_batch in feed_of(store, packing=False).next_step().micro_batches:
        for array in (micro_batch.input_ids, micro_batch.targets, micro_batch.position_ids):
            assert array.dtype == np.int64
            assert array.shape[1] % 16 == 0
            assert array.shape[1] <= 160


def test_padding_is_the_pad_token(store: TokenStore) -> None:
    empty = feed_of(store, world=8, rank=7, micro=1, batch=3).next_step().micro_batches[0]
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
    first, second = feed_of(one), feed_of(many)
    for _ in range(5):
        a, b = first.next_step(), second.next_step()
        for left, right in zip(a.micro_batches, b.micro_batches, strict=True):
            assert np.array_equal(left.input_ids, right.input_ids)
            assert np.array_equal(left.targets, right.targets)
    assert np.array_equal(one.plan(one.plan_spec(64)).row_samples, many.plan(many.plan_spec(64)).row_samples)
    assert [one.place(i) for i in range(30)][7].endswith("rows.jsonl:8")
    assert [many.place(i).split(":")[-1] for i in range(30)] == [str(i + 1) for i in range(30)]
