"""The assembled arrays against an assembly that is too simple to be wrong."""

import numpy as np
import pytest
import torch

from tests.support.corpora import message_rows, tiny_store
from trainer.data.micro_batch import EMPTY_ROW, IGNORED, Assembler, MicroBatch, look_up, make_micro_batch
from trainer.data.store import TokenStore
from trainer.data.store.packing import RowPlan


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    system = {"role": "system", "content": "be brief"}
    long = [
        {"messages": [system, *(turn for turn in row["messages"] if turn["role"] != "system")]}
        for row in message_rows(6, seed=3, turns=9, longest=20)
    ]
    rows = [*message_rows(30, seed=1, turns=3), *long, *message_rows(20, seed=2, turns=1, longest=40)]
    return tiny_store(tmp_path_factory.mktemp("batch"), rows, sequence_length=128, shard_tokens=900)


def assembled(store: TokenStore, plan: RowPlan, rows: list[int], length: int) -> list[np.ndarray]:
    ids = np.full((len(rows), length), store.padding_id)
    targets = np.full((len(rows), length), IGNORED)
    positions = np.zeros((len(rows), length), dtype=int)
    for index, row in enumerate(rows):
        at = 0
        for sample in plan.samples_of(row).tolist() if row != EMPTY_ROW else []:
            start, stop, first, head = (
                int(column[sample]) for column in (plan.start, plan.stop, plan.first_target, plan.head)
            )
            document, spans = store.document(int(plan.document[sample]))
            places = [*range(head), *range(start, stop)]
            for n, t in enumerate(places):
                ids[index, at + n] = document[t]
                positions[index, at + n] = n
                if n >= head and t >= first and any(begin <= t < end for begin, end in spans.tolist()):
                    targets[index, at + n - 1] = document[t]
            at += len(places)
        positions[index, at:] = range(length - at)
    return [ids, targets, positions]


@pytest.mark.parametrize("spec", [{}, {"pin_prefix": True}, {"packing": False}, {"sequence_length": 64, "overlap": 9}])
def test_it_is_what_a_simple_assembly_gives(store: TokenStore, spec: dict[str, int]) -> None:
    assert store.n_shards > 3
    plan = store.plan(store.plan_spec(**spec))  # type: ignore[arg-type]
    assert bool(plan.head.any()) == ("pin_prefix" in spec)
    rows = np.random.default_rng(0).permutation(plan.n_rows).tolist()
    for some in [
        *([*rows[begin : begin + 5], EMPTY_ROW] for begin in range(0, len(rows), 5)),
        *([row] for row in rows),
    ]:
        batch = make_micro_batch(store, plan, some)
        expected = assembled(store, plan, some, batch.input_ids.shape[1])
        for got, right in zip((batch.input_ids, batch.targets, batch.position_ids), expected, strict=True):
            assert got.dtype == np.int64
            assert np.array_equal(got, right)
    nothing = make_micro_batch(store, plan, [EMPTY_ROW])
    assert (nothing.targets == IGNORED).all()


def test_rows_of_one_whole_sample_share_their_position_ids(store: TokenStore) -> None:
    plan = store.plan(store.plan_spec(sequence_length=32, overlap=4))
    assembler = Assembler(store, plan)
    layouts = look_up(store, plan, np.arange(plan.n_rows)[:, None])
    held = [assembler.assemble(layout) for layout in layouts]
    shared = [batch for batch in held if batch.position_ids[0].tolist() == [*range(32)]]
    assert 1 < len(shared) < len(held)
    assert len({batch.position_ids.ctypes.data for batch in shared}) == 1
    assert len({batch.position_ids.ctypes.data for batch in held}) == len(held) - len(shared) + 1


def test_memory_is_used_again_only_when_nobody_holds_it(store: TokenStore) -> None:
    plan = store.plan()
    assembler = Assembler(store, plan)
    layouts = look_up(store, plan, np.arange(plan.n_rows)[:, None])

    def make(row: int) -> MicroBatch:
        return assembler.assemble(layouts[row])

    held = make(0)
    view = make(1).targets[0, 5:]
    tensor = torch.from_numpy(make(2).input_ids)
    kept = [held.input_ids.copy(), held.targets.copy(), held.position_ids.copy(), view.copy(), tensor.clone().numpy()]
    places = {make(row).input_ids.ctypes.data for row in range(plan.n_rows)}
    for array, before in zip(
        (held.input_ids, held.targets, held.position_ids, view, tensor.numpy()), kept, strict=True
    ):
        assert np.array_equal(array, before)
    assert len(places) < 4
    assert not places & {array.ctypes.data for array in (held.input_ids, held.targets, tensor.numpy())}


def test_a_document_that_is_not_there_is_an_error(store: TokenStore) -> None:
    with pytest.raises(IndexError):
        store.locate(np.array([store.n_documents]))
