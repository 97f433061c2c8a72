"""Drills on a real Slurm: the same run, preempted, killed and requeued, without a hand on it."""

from __future__ import annotations

import pytest

from tests.cluster.runs import Runs
from tests.support.training import losses

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def test_a_fresh_run(runs: Runs) -> None:
    run = runs.new("fresh")
    run.submit()
    known = run.wait_for("COMPLETED", "FAILED")
    assert known["ExitCode"] == "0:0", run.output()
    assert losses(run.path) == runs.expected()


def test_a_warning_saves_and_requeues(runs: Runs) -> None:
    run = runs.new("warned")
    job = run.submit()
    run.wait_for_step(40)
    run.slurm.run("scancel", "--batch", "--signal=USR2", job)
    known = run.wait_for("COMPLETED", "FAILED")
    assert known["ExitCode"] == "0:0", run.output()
    assert known["Restarts"] == "1"
    (stopped,) = run.events("stop")
    assert [event["step"] for event in run.events("resume")] == [stopped["step"]]
    assert losses(run.path) == runs.expected()
