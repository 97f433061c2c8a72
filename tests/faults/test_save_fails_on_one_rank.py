"""When one rank cannot write, all ranks give the save up together, and what was committed before stays."""

from tests.support.training import digest, settings
from trainer.checkpoint.verify import committed_steps

TRAIN = "tests.support.training:train"
FULL_DISK = "tests.support.training:train_with_full_disk"


def test_the_attempt_is_abandoned_everywhere(tmp_path, two_ranks, store):
    run = tmp_path / "run"
    values = settings(run, store.path, checkpoint__every_steps=2, checkpoint__asynchronous=False)
    assert two_ranks.run(TRAIN, values=values | {"train": values["train"] | {"max_steps": 2}}) == [None, None]
    before = digest(run)
    found = two_ranks.run(FULL_DISK, values=values, rank=1)
    assert all(
        error.startswith("73: 3 saves in a row failed, the last one of step 6: rank 1: no") for error in found
    ), found
    assert committed_steps(run / "checkpoints") == [2]
    assert digest(run) == before
    assert not list((run / "checkpoints").glob(".tmp-*"))
    assert two_ranks.run(TRAIN, values=values) == [None, None]
    assert committed_steps(run / "checkpoints") == [6, 4]
