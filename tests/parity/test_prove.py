"""`steadfast prove`: equal runs are found equal across restarts and numbers of ranks, others part at the right step."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from steadfast import main
from tests.support.corpora import alpaca_rows, tiny_store
from tests.support.training import settings
from tools.prove import prove
from trainer.errors import CheckpointError, DataError
from trainer.observe.chain import linked, verified_steps
from trainer.run_directory import RunDirectory

TRAIN = "tests.support.training:train"
USUAL = {"checkpoint__every_steps": 2, "checkpoint__keep": 9}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, two_ranks, store) -> Path:
    """Six steps on two ranks, uninterrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert two_ranks.run(TRAIN, values=settings(run, store.path, **USUAL)) == [None, None]
    return run


def rewritten(run: Path, target: Path, step: int, relink: bool, **changes) -> Path:
    """A copy of a run whose ledger says something else of `step`, with hashes that fit when `relink`."""
    shutil.copytree(run, target)
    ledger, before, lines = target / "steps/steps.jsonl", None, []
    for entry in map(json.loads, ledger.read_text().splitlines()):
        line = entry | changes if entry["step"] == step else entry
        before = line | linked(line, before) if relink else line
        lines.append(json.dumps(before))
    ledger.write_text("\n".join(lines) + "\n")
    return target


def test_a_stopped_and_resumed_run_equals_the_uninterrupted_one(tmp_path, two_ranks, store, whole):
    run = tmp_path / "run"
    values = settings(run, store.path, **USUAL)
    assert two_ranks.run(TRAIN, values=values, stop_after=3) == [None, None]
    assert two_ranks.run(TRAIN, values=values) == [None, None]
    proof = prove(run, whole)
    assert proof.equal
    assert (proof.steps, proof.exact_steps, proof.checkpoints) == (6, 6, [2, 4, 6])
    assert main(["prove", str(run), str(whole)]) == 0


def test_work_that_was_lost_and_done_again_stands_in_the_ledger_once(tmp_path, two_ranks, store, whole):
    """Steps 5 and 6 and their checkpoint go away, as after a kill; the ledgers still have them."""
    run = tmp_path / "run"
    values = settings(run, store.path, **USUAL)
    assert two_ranks.run(TRAIN, values=values) == [None, None]
    shutil.rmtree(run / "checkpoints/step-00000006")
    assert two_ranks.run(TRAIN, values=values) == [None, None]
    proof = prove(run, whole)
    assert (proof.equal, proof.exact_steps, proof.checkpoints) == (True, 6, [2, 4, 6])


def test_on_another_number_of_ranks_samples_are_equal_and_numbers_close(tmp_path, one_rank, two_ranks, store, whole):
    run = tmp_path / "run"
    values = settings(run, store.path, **USUAL)
    assert two_ranks.run(TRAIN, values=values, stop_after=4) == [None, None]
    assert one_rank.run(TRAIN, values=values) == [None]
    proof = prove(whole, run)
    assert proof.equal
    assert (proof.steps, proof.exact_steps, proof.checkpoints) == (6, 4, [2, 4, 6])


@pytest.mark.parametrize(
    ("changes", "what", "step"),
    [
        ({"optimizer__learning_rate": 1.1e-3}, "learning_rate", 1),
        ({"optimizer__epsilon": 1.1e-5}, "loss", 2),
        ({"train__max_steps": 4}, "learning_rate", 4),
    ],
)
def test_the_first_step_that_differs_is_named_with_its_reason(tmp_path, two_ranks, store, whole, changes, what, step):
    run = tmp_path / "run"
    assert two_ranks.run(TRAIN, values=settings(run, store.path, **USUAL | changes)) == [None, None]
    found = prove(whole, run)
    assert (found.difference.what, found.difference.step) == (what, step)
    assert main(["prove", str(whole), str(run), "--json"]) == 1


def test_the_same_numbers_of_other_texts_are_other_samples(tmp_path, two_ranks, store, whole):
    rows = alpaca_rows(90, seed=5, longest=4) + alpaca_rows(4, seed=6, longest=120)
    other = tiny_store(tmp_path / "other", rows, sequence_length=384)
    run = tmp_path / "run"
    assert two_ranks.run(TRAIN, values=settings(run, other.path, **USUAL)) == [None, None]
    found = prove(whole, run)
    assert (found.difference.what, found.difference.step, found.steps) == ("data", 0, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("samples", [[1], [2], [3], [4]]),
        ("learning_rate", 2e-3),
        ("rng", "other"),
        ("loss", 1.5),
        ("gradient_norm", 2.5),
    ],
)
def test_each_field_is_compared(tmp_path, whole, field, value):
    found = prove(whole, rewritten(whole, tmp_path / "run", 4, relink=True, **{field: value}))
    assert (found.difference.step, found.difference.what, found.difference.second) == (4, field, value)
    assert found.steps == 3
    assert found.checkpoints == [2]


def test_a_ledger_that_was_changed_proves_nothing(tmp_path, whole):
    run = rewritten(whole, tmp_path / "run", 4, relink=False, loss=1.5)
    with pytest.raises(DataError, match="step 4 was changed"):
        prove(whole, run)
    ledger = run / "steps/steps.jsonl"
    ledger.write_text("".join(line for line in ledger.open() if '"step": 4' not in line))
    with pytest.raises(DataError, match="lacks step 4"):
        list(verified_steps(ledger))


def test_a_run_that_ends_earlier_is_not_equal(tmp_path, two_ranks, store, whole):
    run = tmp_path / "run"
    two_ranks.run(TRAIN, values=settings(run, store.path, **USUAL), stop_after=5)
    found = prove(run, whole)
    assert (found.difference.step, found.steps, found.checkpoints) == (6, 5, [2, 4])


def test_weights_and_moments_are_compared_to_the_bit(tmp_path, whole, monkeypatch):
    """A reader that sees one flipped bit of one moment stands for a checkpoint with other content."""
    from trainer.checkpoint.slices import SliceReader

    run = shutil.copytree(whole, tmp_path / "run")
    original = SliceReader.read

    def read(self, kind, parameter, *arguments):
        found = original(self, kind, parameter, *arguments)
        if self.path == RunDirectory(run).checkpoints / "step-00000004" and (kind, parameter) == ("exp_avg_sq", last):
            found.view(np.uint32)[7] ^= 1
        return found

    last = [*SliceReader(RunDirectory(run).checkpoints / "step-00000004").parameters][-1]
    monkeypatch.setattr(SliceReader, "read", read)
    found = prove(whole, run)
    assert found.difference.step == 4
    assert found.difference.what == f"exp_avg_sq of {last}"
    assert found.checkpoints == [2]


def test_a_damaged_checkpoint_is_named(tmp_path, whole):
    run = shutil.copytree(whole, tmp_path / "run")
    victim = next((run / "checkpoints/step-00000004").glob("rank-00001*"))
    content = bytearray(victim.read_bytes())
    content[-5] ^= 1
    victim.write_bytes(content)
    with pytest.raises(CheckpointError, match="rank-00001"):
        prove(whole, run)
