"""A gradient that is not finite, on one rank only: the step is skipped everywhere, counted, and the weights stay."""

import json
import shutil

import numpy as np
import pytest

from tests.support.training import gathered, losses, settings
from tools.blame import blame_step
from trainer.checkpoint.verify import committed_steps
from trainer.errors import MissingInputError
from trainer.observe.faults import FAULTS, as_text, fail_at, not_fired, planned

TRAIN = "tests.support.training:train"
FAULTY = "tests.support.training:train_with_faults"
SPOILED = "tests.support.training:train_with_spoiled_weights"
POISONED = "tests.support.training:train_poisoned"


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_one_bad_step_is_skipped_on_all_ranks(name, tmp_path, two_ranks, store):
    run = tmp_path / "run"
    values = settings(run, store.path, engine__deepspeed=name)
    assert two_ranks.run(POISONED, values=values, rank=1, steps=[3]) == [None, None]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (skip,) = [event for event in events if event["event"] == "skip"]
    assert skip["step"] == 3
    assert len(skip["rows"]) == 4
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = {entry["step"]: entry["train/learning_rate"] for entry in metrics if "train/loss" in entry}
    assert rates[4] == rates[3], "the schedule moved although the step was skipped"
    assert losses(run)[2] is None
    assert all(np.isfinite(array).all() for array in gathered(run).values())
    assert json.loads((run / "outcome.json").read_text())["skipped_steps"] == 1


def test_a_run_that_skips_every_step_stops_with_78(tmp_path, two_ranks, store):
    values = settings(tmp_path / "run", store.path, train__max_skipped_steps=2)
    found = two_ranks.run(POISONED, values=values, rank=0, steps=[2, 3, 4, 5])
    assert all(error.startswith("78: 2 steps in a row") for error in found)
    assert "the last was step 3" in found[0]


def test_what_is_kept_of_a_skipped_step(tmp_path, two_ranks, store):
    """The gradient alone is bad, the loss is fine."""
    run = tmp_path / "run"
    values = settings(run, store.path, engine__deepspeed="zero3")
    faults = as_text([fail_at(1, "backward", 3, "nan")])
    assert two_ranks.run(FAULTY, values=values, faults=faults) == [None, None]
    assert not not_fired(run, planned({FAULTS: faults}))
    (bundle_file,) = (run / "bad-steps").iterdir()
    assert bundle_file.name == "step-00000003-position-00000008.json"
    bundle = json.loads(bundle_file.read_text())
    assert bundle["gradient_norm"] is None
    assert np.isfinite(bundle["loss"])
    ledger = [json.loads(line) for line in (run / "steps" / "steps.jsonl").read_text().splitlines()]
    assert bundle["rows"] == ledger[2]["rows"]
    rows = bundle["rows_by_loss"]
    assert sorted(row["row"] for row in rows) == sorted(bundle["rows"])
    assert [row["loss"] for row in rows] == sorted((row["loss"] for row in rows), reverse=True)
    tokens = {row["row"]: row["supervised_tokens"] for row in rows}
    mean = sum(row["loss"] * tokens[row["row"]] for row in rows) / sum(tokens.values())
    assert mean == pytest.approx(bundle["loss"], rel=1e-5), "the losses of the rows are not those of the step"
    parts = [part for row in rows for sample in row["samples"] for part in sample["parts"]]
    assert {part["supervised"] for part in parts} == {True, False}
    assert ".jsonl" in rows[0]["samples"][0]["place"]
    assert [layer["layer"] for layer in bundle["layers"]][:2] == ["model.embed_tokens", "model.layers.0"]
    assert all(layer["weight_norm"] > 0 for layer in bundle["layers"])


@pytest.mark.parametrize("rank", [0, 1])
def test_weights_that_are_not_finite_are_never_saved(rank, tmp_path, two_ranks, store):
    values = settings(tmp_path / "run", store.path, checkpoint__every_steps=2)
    found = two_ranks.run(SPOILED, values=values, rank=rank, step=3)
    assert all(error.startswith("78: the weights or moments of model.") for error in found), found
    assert "not finite at step 4, which is not saved" in found[0]
    assert committed_steps(tmp_path / "run" / "checkpoints") == [2]


def test_a_run_rewinds_and_leaves_the_bad_steps_out(tmp_path, two_ranks, one_rank, store):
    """Steps 4 and 5 are bad; their rows never come again, neither in this start nor on one rank."""
    run = tmp_path / "run"
    values = settings(
        run, store.path, train__max_steps=6, train__max_skipped_steps=2, train__on_divergence="rewind",
        checkpoint__every_steps=3,
    )  # fmt: skip
    faults = as_text([fail_at(0, "backward", 4, "nan"), fail_at(1, "forward", 5, "nan")])
    assert two_ranks.run(FAULTY, values=values, faults=faults) == [None, None]
    assert not not_fired(run, planned({FAULTS: faults}))
    quarantine = json.loads((run / "quarantine.json").read_text())
    assert [(entry["step"], entry["position"]) for entry in quarantine] == [(4, 12), (5, 16)]
    assert [entry["position"] for entry in step_lines(run)] == [0, 4, 8, 20, 24, 28]
    assert json.loads((run / "outcome.json").read_text())["status"] == "done"
    assert all(loss is not None for loss in losses(run))
    # One rank, from the beginning, with the same quarantine.
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(run / "quarantine.json", other)
    assert one_rank.run(TRAIN, values=values | {"run": {"dir": str(other), "seed": 3}}) == [None]
    assert [entry["rows"] for entry in step_lines(other)] == [entry["rows"] for entry in step_lines(run)]
    assert np.allclose(losses(other), losses(run), rtol=1e-5)


def step_lines(run):
    return [json.loads(line) for line in (run / "steps" / "steps.jsonl").read_text().splitlines()]


def test_blame_replays_a_step(tmp_path, two_ranks, store):
    run = tmp_path / "run"
    values = settings(run, store.path, checkpoint__every_steps=3)
    assert two_ranks.run(TRAIN, values=values) == [None, None]
    blame = blame_step(run, 4)
    assert (blame.weights_step, blame.left_out) == (3, 0)
    assert blame.loss == pytest.approx(losses(run)[3], rel=1e-5)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (norm,) = [entry["train/grad_norm"] for entry in metrics if entry["step"] == 4 and "train/grad_norm" in entry]
    assert np.linalg.norm(list(blame.layers.values())) == pytest.approx(norm, rel=1e-4)
    assert [sample.loss for sample in blame.samples] == sorted((s.loss for s in blame.samples), reverse=True)
    assert {sample.row for sample in blame.samples} == set(step_lines(run)[3]["rows"])
    assert all(".jsonl" in sample.place for sample in blame.samples)
    assert blame_step(run, 2, most=3).weights_step == 0
    with pytest.raises(MissingInputError, match="has not made step 9; its steps are 1 to 6"):
        blame_step(run, 9)
