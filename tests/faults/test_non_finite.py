"""A gradient that is not finite, on one rank only: the step is skipped everywhere, counted, and the weights stay."""

import json

import numpy as np
import pytest

from tests.support.training import gathered, losses, settings

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
