"""A run that lost its directory to another start: all ranks end with 77, and nothing is committed any more."""

import pytest

from tests.support.takeover import MOMENTS, STEP
from tests.support.training import settings
from trainer.checkpoint.verify import committed_steps

TAKEN_OVER = "tests.support.takeover:train"


@pytest.mark.parametrize("moment", MOMENTS)
def test_all_ranks_end_and_nothing_more_is_committed(moment, tmp_path, two_ranks, store):
    run = tmp_path / "run"
    values = settings(
        run, store.path, train__max_steps=400, checkpoint__every_steps=400 if moment == "a step" else 2,
        checkpoint__asynchronous=moment != "a save on the spot",
    )  # fmt: skip
    found = two_ranks.run(TAKEN_OVER, values=values, moment=moment)
    assert [error[:4] for error in found] == ["77: ", "77: "]
    assert "was taken over by pid 1234 on node007 while this run was frozen" in found[0]
    assert "was taken over by" in found[1]
    assert committed_steps(run / "checkpoints") == ([] if moment == "a step" else [2])
    steps = len((run / "steps" / "steps.jsonl").read_text().splitlines())
    assert STEP <= steps < 400, "it was not the other start that ended it"
    assert not (run / "outcome.json").exists(), "the record is the other run's by now"
