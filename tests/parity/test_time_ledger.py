"""A real run's time ledger: its seconds, its lost work, what TensorBoard shows, and saves as often as advised."""

import json
import shutil
import time

import pytest

from steadfast import main
from tests.support.training import settings
from tools.prove import prove
from trainer.checkpoint.verify import committed_steps
from trainer.observe.goodput import account, timeline
from trainer.observe.ledger import read_lines
from trainer.run_directory import RunDirectory

TRAIN = "tests.support.training:train"


@pytest.fixture(scope="module")
def told(tmp_path_factory, two_ranks, store):
    """A run that stops after step 5, loses its last checkpoint, and goes on to step 8; and how long we saw it run."""
    run = tmp_path_factory.mktemp("told") / "run"
    values = settings(
        run, store.path, train__max_steps=8, checkpoint__every_steps=2, checkpoint__keep=9, data__eval=str(store.path),
        logging__tensorboard=True,
    ) | {"evaluate": {"every_steps": 4, "max_rows": 4}}  # fmt: skip
    began = time.monotonic()
    assert two_ranks.run(TRAIN, values=values, stop_after=5) == [None, None]
    first = time.monotonic() - began
    shutil.rmtree(run / "checkpoints/step-00000005")
    began = time.monotonic()
    assert two_ranks.run(TRAIN, values=values) == [None, None]
    return RunDirectory(run), first + time.monotonic() - began


def test_every_second_and_every_step_is_accounted_for(told):
    run, seen = told
    table = account(timeline(run))
    assert sum(table.seconds.values()) == pytest.approx(table.wall_seconds)
    # The worker lives on between the two runs and before the first; what it did meanwhile is start or queue.
    running = table.wall_seconds - table.seconds["queue"] - table.seconds["start"]
    assert 0.9 * seen < running + table.seconds["start"]
    assert running < seen
    assert (table.attempts, table.failures, table.lost_steps) == (2, 0, 1)
    for kind in (
        "load",
        "compute",
        "data_wait",
        "communication_wait",
        "checkpoint",
        "evaluation",
        "lost_work",
        "shutdown",
    ):
        assert table.seconds[kind] > 0, kind
    assert table.seconds["hang"] == 0
    assert table.rank_seconds["compute"] == pytest.approx(2 * table.seconds["compute"])


def test_the_command_shows_it_with_its_price(told, capsys):
    run, _ = told
    assert main(["goodput", str(run.path), "--price-per-hour", "3", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["accounted"] == pytest.approx(1, abs=1e-6)
    assert answer["cost"]["compute"] == pytest.approx(answer["rank_seconds"]["compute"] / 3600 * 3)
    assert answer["advice"]["steps"] > 1
    assert main(["goodput", str(run.path)]) == 0
    assert "goodput" in capsys.readouterr().out
    assert main(["goodput", str(run.path.parent)]) == 66
    with pytest.raises(SystemExit):
        main(["goodput", str(run.path), "--price-per-hour", "much"])


def test_metrics_and_tensorboard_have_it(told):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = told
    last = [line for line in read_lines(run.metrics) if "train/loss" in line][-1]
    table = account(timeline(run))
    assert last["goodput/lost_work_seconds"] == pytest.approx(table.seconds["lost_work"], abs=0.01)
    assert 0 < last["goodput/share"] < 1
    shown = EventAccumulator(str(run.tensorboard))
    shown.Reload()
    assert [event.step for event in shown.Scalars("goodput/share")] == [*range(1, 9)]


def test_auto_saves_early_then_as_seldom_as_allowed(tmp_path, two_ranks, store, told):
    """Saves of this model cost next to nothing and nothing fails: the advice is far beyond the upper bound."""
    run = tmp_path / "run"
    values = settings(run, store.path, train__max_steps=8, data__eval=str(store.path)) | {
        "evaluate": {"every_steps": 4, "max_rows": 4},
        "checkpoint": {"every_steps": "auto", "auto_at_least": 2, "auto_at_most": 3, "keep": 9},
    }
    assert two_ranks.run(TRAIN, values=values, stop_after=6) == [None, None]
    assert committed_steps(run / "checkpoints") == [6, 4, 2]
    # What was measured before the stop counts from the next start on: step 8 is only saved because it is the last.
    assert two_ranks.run(TRAIN, values=values) == [None, None]
    assert committed_steps(run / "checkpoints") == [8, 6, 4, 2]
    assert prove(run, told[0].path).equal


def test_a_ledger_that_cannot_be_written_does_not_stop_the_run(tmp_path, two_ranks, store):
    run = tmp_path / "run"
    (run / "time.jsonl").mkdir(parents=True)
    assert two_ranks.run(TRAIN, values=settings(run, store.path, train__max_steps=2)) == [None, None]
    assert json.loads((run / "outcome.json").read_text())["status"] == "done"
