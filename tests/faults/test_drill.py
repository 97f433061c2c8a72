"""The drill itself, over the full stack: launcher, two ranks, DeepSpeed, checkpoints. Nothing is lost, to the bit."""

import json

import pytest
import yaml

from steadfast import main
from tests.support.training import settings
from tools.drills.plan import plan_drill
from trainer.observe.goodput import account, timeline
from trainer.run_directory import RunDirectory


def drill(capsys, tmp_path, store, faults, count, seed):
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(settings(tmp_path / "run", store.path)))
    words = ["--faults", faults, "--count", str(count), "--seed", str(seed), "--nproc", "2", "--json"]
    code = main(["drill", str(config), *words, "--out", str(tmp_path / "drill")])
    out, err = capsys.readouterr()
    assert code in (0, 1), err
    answer = json.loads(out.splitlines()[-1])
    assert code == 0, [row for row in answer["faults"] if row["problem"] or not row["equal"]]
    assert len(answer["faults"]) == count
    return answer["faults"]


@pytest.mark.timeout(900)
def test_five_kills_of_ranks_and_launcher_end_with_equal_weights(capsys, tmp_path, store):
    """The seed is one whose five kills hit a rank, all ranks and the launcher."""
    seed = 32
    (planned,) = plan_drill(["kill"], 5, seed, 2, small_disk=False)
    assert {strike.victim.partition(" ")[0] for strike in planned.strikes} == {"rank", "all", "launcher"}
    rows = drill(capsys, tmp_path, store, "kill", 5, seed)
    assert all(row["resumed_at"] is not None and row["equal"] for row in rows)
    table = account(timeline(RunDirectory(tmp_path / "drill/round-1")))
    assert sum(table.seconds.values()) == pytest.approx(table.wall_seconds)
    assert (table.attempts, table.failures) == (6, 5)
    assert table.lost_steps == sum(row["lost_steps"] for row in rows) > 0
    assert table.seconds["lost_work"] + table.seconds["hang"] > 0


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize(("faults", "count"), [("kill", 200), ("kill,term,stop,enospc,nan,flip", 60)])
def test_many_faults(capsys, tmp_path, store, seed, faults, count):
    drill(capsys, tmp_path, store, faults, count, seed)
